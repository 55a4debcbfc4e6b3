"""Half precision and 8-bit integers, for ONNX: onnxruntime's own converters, and their effect on the results."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgformer.data.image import Images
from sgformer.exporting.formats.onnx import onnx_session, set_onnx_metadata
from sgformer.exporting.onnx_predict import ExportedNetwork
from sgformer.exporting.quiet import quiet

#: Maximum numbers of images: for calibration, and for the comparison.
CALIBRATED, MEASURED = 64, 200

#: Operators kept in float32 in an fp16 file: sorting by significance would lose ranks to equal half-precision values.
KEPT_IN_FLOAT32 = ["TopK", "Resize", "Range", "NonMaxSuppression", "RoiAlign"]


@dataclass(frozen=True)
class Quantized:
    """An fp16 or int8 file compared with its float32 twin, both in onnxruntime on this machine's CPU.

    Attributes:
        how: e.g. "int8, dynamic".
        bytes: of the twin and of the file.
        seconds: per image, of the twin and of the file: medians of interleaved runs.
        images: number of images compared on; 0: noise.
        agreement: share of images (segmentation: of pixels) whose most probable class is the same; None on noise.
        difference: the largest difference of logits, relative to the largest logit.
    """

    how: str
    bytes: tuple[int, int]
    seconds: tuple[float, float]
    images: int
    agreement: float | None
    difference: float

    def describe(self) -> list[str]:
        """The report to print."""
        (size, small), (slow, fast) = self.bytes, self.seconds
        on = f"on {self.images} images" if self.images else "on noise"
        same = "" if self.agreement is None else f", the same prediction in {100 * self.agreement:.1f} %"
        return [
            f"{self.how} against float32 {on}: logits differ by up to {self.difference:.1e} of the largest{same}",
            f"  {small / 1e6:.1f} MB instead of {size / 1e6:.1f}; "
            f"{1e3 * fast:.0f} ms per image instead of {1e3 * slow:.0f}",
        ]


def convert(path: Path, precision: str, calibration: Any, prepare: Any, about: dict[str, Any]) -> Quantized:
    """Convert the float32 file at ``path`` to lower precision, in place, and compare the two.

    Raises:
        UserError: ``calibration`` holds no image, or an unreadable one.
    """
    import onnx

    twin = path.with_name("float32.onnx")
    os.replace(path, twin)
    with quiet():
        if precision == "fp16":
            from onnxruntime.transformers.float16 import convert_float_to_float16

            model = convert_float_to_float16(onnx.load(twin), keep_io_types=True, op_block_list=KEPT_IN_FLOAT32)
            set_onnx_metadata(model, about)
            onnx.save(model, path)
            how = "fp16"
        elif calibration is None:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(twin, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
            how = "int8, dynamic"
        else:
            _static(twin, path, calibration, prepare)
            how = "int8, static"
    pictures = []
    if calibration is not None:
        pictures = list(read_pictures(ExportedNetwork(twin), calibration, MEASURED, prepare))
    return _compare(twin, path, how, pictures, about)


def read_pictures(
    network: ExportedNetwork, folder: str | os.PathLike[str], most: int, prepare: Any
) -> Iterator[np.ndarray]:
    """The images of a folder as network inputs, (1, 3, H, W) float32, one at a time."""
    for _, image in islice(Images(folder), most):
        yield prepare(network, image)


def _static(twin: Path, path: Path, calibration: str, prepare: Any) -> None:
    """Quantize weights and inputs of linear maps and convolutions to 8 bits, by their ranges on calibration images."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.pictures = read_pictures(ExportedNetwork(twin), calibration, CALIBRATED, prepare)

        def get_next(self) -> Any:
            picture = next(self.pictures, None)
            return None if picture is None else {"image": picture}

    graph = onnx.load(twin).graph
    constants = {tensor.name for tensor in graph.initializer}
    weighted = [n.name for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in constants]
    quantize_static(
        twin,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        nodes_to_quantize=weighted,
    )


def _compare(twin: Path, path: Path, how: str, pictures: list[np.ndarray], about: dict[str, Any]) -> Quantized:
    height, width = about["input_size"] or (224, 224)
    images = pictures or [torch.randn(1, 3, height, width).numpy() for _ in range(4)]
    sessions = onnx_session(twin), onnx_session(path)
    same, count, difference = 0, 0, 0.0
    for image in images:
        before, after = (session.run(None, {"image": image})[0] for session in sessions)
        same += int((before.argmax(1) == after.argmax(1)).sum())
        count += before.argmax(1).size
        difference = max(difference, float(np.abs(after - before).max() / np.abs(before).max()))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(7):
        for session, samples in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, {"image": images[0]})
            samples.append(time.perf_counter() - start)
    return Quantized(
        how,
        (twin.stat().st_size, path.stat().st_size),
        (statistics.median(times[0]), statistics.median(times[1])),
        len(pictures),
        same / count if pictures else None,
        difference,
    )
