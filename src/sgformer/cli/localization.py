"""`sgformer localization`."""

from __future__ import annotations

from sgformer.core.errors import UserError, require
from sgformer.core.files import distrust_run, try_folder
from sgformer.core.terminal import say


def localization(
    weights: str,
    data: str | None = None,
    split: str = "val",
    out: str | None = None,
    limit: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    model: str | None = None,
    device: str = "auto",
) -> int:
    """Measure whether a trained network spends its tokens on the objects more often than by chance.

    Args:
        weights: of any task: a run folder, .safetensors, a checkpoint, sgformer_n
        data: COCO or ADE20K layout, or scenes of `sgformer data scenes`
        split: split to measure on
        out: folder for localization.csv, localization.json and localization.png
        limit: maximum number of images, spread evenly
        image_size: pixels; by default as trained
        model: network name, if the weights are a plain state dict
        device: auto, cpu, cuda, cuda:1, mps
    """
    if data is None:
        raise UserError("--data is missing: images with annotated objects (COCO, ADE20K, composed scenes)")
    if limit is not None and limit < 2:
        raise UserError(f"--limit must be above 1, got {limit}")

    from sgformer.data.objects import find_objects
    from sgformer.explaining.localization import PERMUTATIONS, localize, table, write_localization
    from sgformer.tasks.api import load_explainer

    if out is not None:
        require("matplotlib", extra="train")
        distrust_run(weights)
        try_folder(out)
    explainer = load_explainer(weights, device, model, image_size=image_size)
    objects = find_objects(data, split)
    found = localize(explainer, objects, limit)
    say(*table(found).split("\n"))
    say(
        "inside: energy of salient tokens on the image's own objects; area: the objects' share of the image; "
        f"shuffled: on other images' objects; p: permutation test, {PERMUTATIONS} permutations"
    )
    if out is not None:
        about = {"weights": weights, "data": data, "split": split, "permutations": PERMUTATIONS}
        write_localization(found, out, about)
        say(f"tables and plot: {out}")
    return 0
