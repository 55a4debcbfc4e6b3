"""`sgformer predict`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from sgformer.cli.images import exit_status, open_images
from sgformer.cli.parser import given
from sgformer.core.errors import UserError
from sgformer.core.files import distrust_run, fitting, make_folder, to_json, try_file, try_folder, write_json
from sgformer.core.names import dashed, printable
from sgformer.core.terminal import say


def predict(
    weights: str,
    images: list[str],
    top: int | None = None,
    score: float | None = None,
    json: str | None = None,
    out: str | None = None,
    features: str | None = None,
    batch_size: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    sliding: bool = False,
    model: str | None = None,
    tokens: float | None = None,
    precision: Literal["fp32", "bf16", "int8"] | None = None,
    device: str = "auto",
    bad_images: Literal["skip", "stop"] = "skip",
) -> int:
    """Run a network on images: the most probable classes, a class for every pixel, or objects.

    Args:
        weights: a run folder, .safetensors, a checkpoint, sgformer_n, or .onnx
        images: image files, or folders of them
        top: classification: classes per image [5]
        score: detection, keypoints: minimum score [0.5]
        json: write the results to this file (detection, keypoints: COCO annotations); -: to stdout only
        out: folder for annotated images (segmentation: and label maps)
        features: write the images' embeddings to this .npz file, instead of results
        batch_size: classification, --features: images per batch [32]
        image_size: pixels; by default as trained
        multi_scale: segmentation: average over six sizes, .5 to 1.75
        flip: segmentation: average with the mirrored image
        sliding: segmentation: slide a window over the image instead of passing it whole
        model: network name, if the weights are a plain state dict
        tokens: key/value tokens, as a multiple of those trained with: .25 to 4
        precision: classification on a CPU that has AVX512-BF16 or VNNI: bf16, int8 [fp32]
        device: auto, cpu, cuda, cuda:1, mps
        bad_images: on an unreadable image: skip it, name it and exit with 1; or stop
    """
    for name, value in (("--top", top), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be above 0, got {value}")
    if features is not None:
        others = given(top=top, score=score, json=json, out=out, multi_scale=multi_scale, flip=flip, sliding=sliding)
        others |= given(precision=precision)
        for name in others:
            raise UserError(f"--features writes embeddings only; leave out --{dashed(name)}")
        how = given(model=model, tokens=tokens, image_size=image_size, batch_size=batch_size)
        return write_features(weights, images, Path(features), bad_images, device=device, **how)
    from sgformer.tasks.api import predict_images

    distrust_run(weights)
    options = given(
        top=top,
        score=score,
        batch_size=batch_size,
        image_size=image_size,
        multi_scale=multi_scale,
        flip=flip,
        sliding=sliding,
        precision=precision,
    )
    opened = open_images(images, bad_images)
    task, results, metadata = predict_images(weights, opened, model=model, tokens=tokens, device=device, **options)
    width = min(60, max(len(str(source)) for source in opened.sources))
    if out:
        try_folder(out)
    if json and json != "-":
        try_file(json, "--json")
    kept, stems, done = [], Counter[str](), 0
    for done, (result, image) in enumerate(results, 1):
        if json:
            kept.append(result)
        if json != "-":
            say(f"{printable(result.image):<{width}}  {task.line(result)}")
        if out:
            make_folder(out)
            task.draw(result, image, Path(out), done - 1, own_stem(result.image, stems, out), metadata)
    status = exit_status(opened, done)
    if json == "-":
        say(*to_json(task.to_json(kept, metadata)).split("\n"))
    elif json:
        make_folder(Path(json).parent)
        write_json(json, task.to_json(kept, metadata))
    return status


def write_features(weights: str, images: list[str], path: Path, bad_images: str, **options: Any) -> int:
    """`sgformer predict --features`."""
    if path.suffix != ".npz":
        raise UserError(f"--features {path}: the file's name must end in .npz")
    distrust_run(weights)
    try_file(path, "--features")
    from sgformer.tasks.api import embed_images

    opened = open_images(images, bad_images)
    result = embed_images(weights, opened, **options)
    status = exit_status(opened, len(result.images))
    make_folder(path.parent)
    result.write(path)
    say(f"{path}: names, and features {' x '.join(map(str, result.features.shape))}")
    return status


def own_stem(path: str, taken: Counter[str], folder: str) -> str:
    """A file's stem, cut if it is too long for the folder, and numbered if an earlier image had the same."""
    stem = own = fitting(Path(path).stem, folder)
    while own in taken:
        taken[stem] += 1
        own = f"{stem}-{taken[stem]}"
    taken[own] += 1
    return own
