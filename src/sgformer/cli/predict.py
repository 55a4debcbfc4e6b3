"""`sgformer predict`."""

from __future__ import annotations

from pathlib import Path

from sgformer.cli.output import write_json
from sgformer.cli.tasks import options_of_task, task_of
from sgformer.errors import UserError


def predict(
    weights: str,
    images: list[str],
    top: int | None = None,
    score: float | None = None,
    json: str | None = None,
    out: str | None = None,
    batch_size: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    sliding: bool = False,
    device: str = "auto",
) -> int:
    """Say what is on images: the most probable classes of each, the class of every pixel, or objects and where.

    Args:
        weights: a run folder, a .safetensors file or a released .pth
        images: image files, or folders of them
        top: classification: classes per image [5]
        score: detection: leave out what is less certain [0.5]
        json: write the answers to this file (detection: COCO annotations); -: to standard output, and nothing else
        out: write annotated pictures (segmentation: and label maps) into this folder
        batch_size: classification: images at a time [32]
        image_size: pixels; by default as trained
        multi_scale: segmentation: average over six sizes, .5 to 1.75
        flip: segmentation: average over the mirror image
        sliding: segmentation: move a window over the image instead of taking it whole
        device: auto, cpu, cuda, cuda:1, mps
    """
    for name, value in (("--top", top), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be above 0, got {value}")
    task = task_of(weights)
    special = {"top": top, "score": score, "batch_size": batch_size}
    special |= {"multi_scale": multi_scale, "flip": flip, "sliding": sliding}
    options = {**options_of_task(weights, task, special), "image_size": image_size, "device": device}
    if task == "segment":
        from sgformer.cli import segment

        return segment.predict(weights, images, json, out, **options)
    if task == "detect":
        from sgformer.cli import detect

        return detect.predict(weights, images, json, out, **options)

    from sgformer import api

    predictions = api.predict(weights, images, **options)
    if json:
        write_json([p.to_dict() for p in predictions], json)
    if json != "-":
        wide = min(60, max(len(p.image) for p in predictions))
        for p in predictions:
            labels = "   ".join(f"{name} {100 * share:.1f} %" for name, share in p.labels)
            print(f"{p.image:<{wide}}  {labels}")
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        for number, p in enumerate(predictions):
            api.annotate(p, Path(out) / f"{number:04d}-{Path(p.image).stem}.png")
    return 0
