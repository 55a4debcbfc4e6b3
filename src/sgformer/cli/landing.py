"""`sgformer landing`."""

from __future__ import annotations

from sgformer.errors import UserError, require


def landing(
    weights: str,
    data: str | None = None,
    split: str = "val",
    out: str | None = None,
    limit: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    device: str = "auto",
) -> int:
    """Measure whether a trained network spends its tokens on the objects more often than chance.

    Args:
        weights: of any task: a run folder, a .safetensors file or a released .pth
        data: COCO or ADE20K layout, or scenes of `sgformer data scenes`
        split: part of the data to measure on
        out: folder for landing.csv, landing.json and landing.png
        limit: so many images at most, spread evenly
        image_size: pixels; by default as trained
        device: auto, cpu, cuda, cuda:1, mps
    """
    if data is None:
        raise UserError("--data is missing: images whose objects are known (COCO, ADE20K, composed scenes)")
    if limit is not None and limit < 2:
        raise UserError(f"--limit must be above 1, got {limit}")

    from sgformer.landing import PERMUTATIONS, landing, table, write_landing

    found = landing(weights, data, split=split, limit=limit, image_size=image_size, device=device)
    print(table(found))
    print(
        "inside: salient tokens in the image's own objects; area: the objects' share of the image; "
        f"others: in other images' objects; p: permutation test, {PERMUTATIONS} deals"
    )
    if out is not None:
        require("matplotlib", extra="train")
        write_landing(found, out, {"weights": weights, "data": data, "split": split, "permutations": PERMUTATIONS})
        print(f"tables and picture: {out}")
    return 0
