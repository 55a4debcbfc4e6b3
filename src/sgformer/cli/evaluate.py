"""`sgformer eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sgformer.cli.parser import given
from sgformer.core.errors import UserError
from sgformer.core.files import try_folder
from sgformer.core.terminal import say


def evaluate(
    weights: str,
    data: str | None = None,
    split: str | None = None,
    out: str | None = None,
    batch_size: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    crop_pct: float | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    sliding: bool = False,
    images: str | None = None,
    knn: bool = False,
    linear_probe: bool = False,
    val_split: float | None = None,
    split_seed: int | None = None,
    model: str | None = None,
    tokens: float | None = None,
    workers: int = 4,
    device: str = "auto",
    devices: int | Literal["auto"] = "auto",
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32",
    bad_images: Literal["stop", "skip"] = "stop",
) -> int:
    """Evaluate trained weights on validation data, counting every image once.

    Args:
        weights: a run folder, .safetensors, a released or timm checkpoint, sgformer_n
        data: data set folder, in the layout of the training
        split: split to evaluate on [val, or validation]; all: of data that are not split
        out: folder for tables and pictures [RUN/eval, or WEIGHTS-eval]
        batch_size: images per batch in each process [64; dense tasks 8]
        image_size: pixels; by default as trained
        crop_pct: classification: resize to size / crop-pct, crop the centre; by default as trained
        multi_scale: segmentation: average over six sizes, .5 to 1.75
        flip: segmentation: average with the mirrored image
        sliding: segmentation: slide a window over the image instead of passing it whole
        images: detection, keypoints: folder of the images, if not beside the JSON
        knn: score the features: nearest neighbours among those of data/train
        linear_probe: score the features: a linear classifier fitted to those of data/train
        val_split: with knn, linear-probe: share of the images to score, of data without validation images
        split_seed: of --val-split [0]
        model: network name, if the weights are a plain state dict
        tokens: key/value tokens, as a multiple of those trained with: .25 to 4
        workers: processes that read images; 0: none
        device: auto, cpu, cuda, cuda:1, mps
        devices: processes on this machine, one per GPU
        precision: arithmetic; bf16, fp16: mixed; int8: classification on a CPU with AVX512-VNNI
        bad_images: on an unreadable image: stop, or skip and count
    """
    from sgformer.models.load import read_metadata
    from sgformer.tasks import api
    from sgformer.tasks.registry import task_of

    task = task_of(read_metadata(weights).get("task", "classify"), weights)
    by_features = knn or linear_probe
    if data is None:
        layout = "the folder with train/CLASS/* and val/CLASS/*" if by_features else task.data_help
        raise UserError(f"--data is missing: {layout}")
    options = given(
        split=split,
        batch_size=batch_size,
        image_size=image_size,
        crop_pct=crop_pct,
        multi_scale=multi_scale,
        flip=flip,
        sliding=sliding,
        images=images,
        knn=knn,
        linear_probe=linear_probe,
        val_split=val_split,
        split_seed=split_seed,
    )
    path = Path(weights)
    folder = Path(out) if out else path / "eval" if path.is_dir() else path.with_name(f"{path.stem}-eval")
    if not out and folder.is_symlink():
        raise UserError(f"{folder}: a link; remove it, or name a folder with --out")
    try_folder(folder)
    result = api.evaluate(
        weights,
        data,
        model=model,
        tokens=tokens,
        out=folder,
        workers=workers,
        device=device,
        devices=devices,
        precision=precision,
        bad_images=bad_images,
        **options,
    )
    from lightning.pytorch.utilities import rank_zero_only

    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        say(*result.table().split("\n"))  # first: whatever becomes of the files, the numbers are there
        say(result.counted() + (f", {len(result.skipped)} unreadable images left out" if result.skipped else ""))
        result.write(folder)
        say(f"numbers: {folder / 'features.json'}" if by_features else f"{task.written}: {folder}")
    return 0
