"""`sgformer predict`."""

from __future__ import annotations

from typing import Any

from sgformer.cli.report import report_classes, report_objects, report_segments
from sgformer.cli.tasks import options_of_task, task_of
from sgformer.core.errors import UserError
from sgformer.training.config import dashed


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
        weights: a run folder, .safetensors, released .pth, or .onnx of sgformer export
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
    special = {"top": top, "score": score, "batch_size": batch_size}
    special |= {"multi_scale": multi_scale, "flip": flip, "sliding": sliding}
    if weights.endswith(".onnx"):
        return predict_exported(weights, images, json, out, image_size, device, special)
    task = task_of(weights)
    options = {**options_of_task(weights, task, special), "image_size": image_size, "device": device}
    if task == "detect":
        from sgformer.models.load import read_metadata
        from sgformer.tasks.detect.api import predict_detections

        report_objects(predict_detections(weights, images, **options), read_metadata(weights), json, out)
    elif task == "segment":
        from sgformer.tasks.segment.api import predict_segmentation

        report_segments(predict_segmentation(weights, images, **options), json, out)
    else:
        from sgformer.tasks.classify import api

        report_classes(api.predict(weights, images, **options), json, out)
    return 0


def predict_exported(
    path: str, images: list[str], json: str | None, out: str | None, image_size: Any, device: str, special: Any
) -> int:
    """The same with a file of `sgformer export`. Nothing here imports torch."""
    from sgformer.exporting import onnx_predict as exported

    if device not in ("auto", "cpu"):
        raise UserError(f"--device {device}: exported files run on the CPU here")
    network = exported.ExportedNetwork(path)
    task = network.metadata["task"]
    options = {**options_of_task(path, task, special), "image_size": image_size}
    for name in ("multi_scale", "flip", "sliding"):
        if name in options:
            raise UserError(f"--{dashed(name)} is for weights; {path} is an exported file")
    if task == "segment":
        report_segments(exported.predict_segmentation(network, images, **options), json, out)
    elif task == "detect":
        report_objects(exported.predict_detections(network, images, **options), network.metadata, json, out)
    else:
        report_classes(exported.predict(network, images, **options), json, out)
    return 0
