"""`sgformer export`."""

from __future__ import annotations

from typing import Literal

from sgformer.core.errors import UserError
from sgformer.core.terminal import say
from sgformer.exporting.formats import FORMATS


def export(
    weights: str,
    out: str | None = None,
    format: str = "onnx",
    image_size: int | tuple[int, int] | None = None,
    features: bool = False,
    significance: bool = False,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    calibration: str | None = None,
    model: str | None = None,
    tokens: float | None = None,
) -> int:
    """Export a network to another runtime, and compare its outputs there with PyTorch's.

    Args:
        weights: a run folder, .safetensors, a released or timm checkpoint, sgformer_n
        out: the file to write: .onnx, .pt2 (torch-export) or .xml (openvino); hub: a new folder
        format: one of FORMATS
        image_size: fixed input size, a multiple of 32; by default any multiple of 32 (a detector: as trained)
        features: also output the four feature maps
        significance: also output the significance map of every hybrid-scale block
        precision: fp32; onnx: also fp16 and int8
        calibration: folder of images for static int8, and for measuring the change in the results
        model: network name, if the weights are a plain state dict
        tokens: key/value tokens, as a multiple of those trained with: .25 to 4
    """
    if out is None:
        raise UserError("--out is missing: the file to write")
    from sgformer.tasks.api import export as run

    result = run(
        weights,
        out,
        format=format,
        image_size=image_size,
        features=features,
        significance=significance,
        precision=precision,
        calibration=calibration,
        model=model,
        tokens=tokens,
    )
    say(*result.describe().split("\n"))
    return 0


export.__doc__ = str(export.__doc__).replace("FORMATS", ", ".join(FORMATS.names()))
