"""Exporting networks to other runtimes: each file is run in its runtime and compared with PyTorch."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgformer import ops
from sgformer.core.errors import UserError
from sgformer.core.files import make_folder, try_file
from sgformer.core.names import printable
from sgformer.data.image import height_and_width
from sgformer.exporting.formats import FORMATS, ExportFormat, Runner
from sgformer.exporting.graphs import Graph
from sgformer.models.backbone import SGFormer

#: (exported file, PIL image) -> (1, 3, H, W) float32, the file's input.
Prepare = Callable[[Any, Any], Any]

#: The largest accepted difference from PyTorch, relative to the output's largest value, in float32.
TOLERANCE = 1e-4
#: Tokens whose significance differs by less than this, relative to the image's largest, may change ranks.
EQUAL = 1e-4
PRECISIONS = ("fp32", "fp16", "int8")

TRACED = (2, 224, 288)
#: Where a file of open size is compared with PyTorch: other batches, sides that windows tile and that they do not.
CHECKED = ((1, 224, 224), (3, 160, 256), (1, 96, 352), (2, 64, 64))
#: In addition, if sizes need not be multiples of 32.
CHECKED_ODD = ((1, 75, 130),)


@dataclass(frozen=True)
class Check:
    """One comparison of a file in its own runtime with PyTorch.

    Attributes:
        shape: of the image, (B, 3, H, W).
        differences: of each output, the largest difference relative to the largest value, if PyTorch sorts tokens of
            (almost) equal significance like the file.
        swapped: the largest difference of any output if each sorts on its own.
    """

    shape: tuple[int, ...]
    differences: dict[str, float]
    swapped: float

    @property
    def largest(self) -> float:
        return max(self.differences.values())


@dataclass(frozen=True)
class Export:
    """The files written, and how they compare with PyTorch.

    Attributes:
        files: the files, or the folder.
        fixed: why the image size is fixed; None if sizes are open.
        input_size: that size, (height, width).
        step: open sizes are multiples of this many pixels.
        outputs: their names.
        checks: of the float32 network.
        quantized: of fp16 and int8, the comparison with the float32 file.
    """

    files: list[Path]
    fixed: str | None
    input_size: tuple[int, int] | None
    step: int
    outputs: list[str]
    checks: list[Check]
    quantized: Any = None

    @property
    def largest(self) -> float:
        """The largest difference of any output at any shape."""
        return max(check.largest for check in self.checks)

    def describe(self) -> str:
        """The report to print."""
        inner = [f for file in self.files for f in (file.rglob("*") if file.is_dir() else [file])]
        megabytes = sum(file.stat().st_size for file in inner) / 1e6
        takes = f"images from 32 pixels up{'' if self.step == 1 else f', in multiples of {self.step}'}, any batch"
        if self.input_size:
            takes = f"{self.input_size[0]} x {self.input_size[1]} pixels only ({self.fixed})"
        lines = [
            f"wrote {' and '.join(printable(str(file)) for file in self.files)}, {megabytes:.1f} MB",
            f"input: {takes}; outputs: {', '.join(self.outputs)}",
            "largest difference from PyTorch, relative to the output's largest value (and if each ranks tokens of",
            "equal significance on its own):",
            *(f"  {' x '.join(map(str, c.shape)):<20} {c.largest:.1e}  ({c.swapped:.1e})" for c in self.checks),
        ]
        return "\n".join([*lines, *(self.quantized.describe() if self.quantized else ())])


def export_graph(
    graph_of: Callable[[bool], Graph],
    out: str | os.PathLike[str],
    *,
    format: str = "onnx",
    image_size: int | tuple[int, int] | None = None,
    precision: str = "fp32",
    calibration: str | os.PathLike[str] | None = None,
    prepare: Prepare | None = None,
) -> Export:
    """Export a graph to another runtime, run the file there, and compare it with PyTorch.

    Args:
        graph_of: whether the format can hold a whole detector -> the graph.
        out, format, image_size, precision, calibration: see `sgformer.export`.
        prepare: prepares images for the exported file; needed for `calibration`.

    Raises:
        UserError: see `sgformer.export`.
    """
    out = Path(out)
    kind: ExportFormat = FORMATS.get(format)()
    if precision not in PRECISIONS:
        raise UserError(f"--precision is one of {', '.join(PRECISIONS)}, got {precision}")
    if precision != "fp32" and format != "onnx":
        raise UserError(f"--precision {precision} is for --format onnx; other formats have their own tools for it")
    if calibration is not None and precision == "fp32":
        raise UserError("--calibration is for --precision int8 and fp16")
    if kind.folder and image_size is not None:
        raise UserError(f"--image-size is for formats of one size; a network of format {format} takes any")
    if kind.folder and out.exists():
        raise UserError(f"{out}: exists already; --out is a new folder for format {format}")
    if out.suffix != kind.suffix and not kind.folder:
        raise UserError(f"{out}: the name of a file of format {format} ends in {kind.suffix}")
    try_file(out)
    kind.require()
    graph = graph_of(kind.whole)
    if not kind.folder and (reason := graph.why_unsupported()):
        raise UserError(f"this network cannot be exported: {reason}")
    size = None if kind.folder else _fixed_size(graph, image_size)
    reason = None
    if size is not None:
        reason = "as requested" if image_size is not None else "a whole detector has a fixed size"
    step = 1 if kind.any_size else 32
    about = {**graph.about, "precision": precision, "input_size": size, "multiple": step}
    torch.manual_seed(0)
    example = torch.randn(1 if graph.whole_image else TRACED[0], 3, *(size or TRACED[1:]))
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        unfinished = Path(folder) / out.name
        files = kind.write(graph, example, size, about, unfinished)
        tried = height_and_width(graph.about["image_size"]) if kind.folder else size
        checks = compare(graph, kind.open(unfinished), _shapes(graph, tried, step))
        worst = max(checks, key=lambda check: check.largest)
        if not worst.largest <= TOLERANCE:  # also if NaN
            name = max(worst.differences, key=lambda n: worst.differences[n])
            raise UserError(
                f"{out}: not written, {name} differs from PyTorch by {worst.largest:.1e} of its largest value at "
                f"{'x'.join(map(str, worst.shape))} (at most {TOLERANCE:.0e})"
            )
        quantized = None
        if precision != "fp32":
            from sgformer.exporting.quantize import convert

            quantized = convert(unfinished, precision, calibration, prepare, about)
        for file in files:
            os.replace(file, out.parent / file.name)
    return Export([out.parent / f.name for f in files], reason, size, step, graph.names, checks, quantized)


def compare(graph: Graph, run: Runner, shapes: Sequence[tuple[int, int, int]]) -> list[Check]:
    """Compare a file in its runtime with the network in PyTorch, on noise of each shape (B, H, W).

    Sorting is not continuous. If two tokens' significance is equal up to rounding, a file may rank them differently
    from PyTorch here (as may PyTorch on another machine), which moves outputs by some 1e-4. So PyTorch runs twice: with
    its own ranks, and with those of the file (if it exposes them), once these prove to be valid ranks of PyTorch's own
    significance.
    """
    checks = []
    for batch, height, width in shapes:
        image = torch.randn(batch, 3, height, width)
        found, orders = run(image)
        with torch.no_grad():
            alone = graph(image)
            following: Any = contextlib.nullcontext([]) if orders is None else ranked(orders)
            with following as wrong:
                expected = graph(image)
        differences = {name: difference(a, b) for name, a, b in zip(graph.names, found, expected, strict=True)}
        if wrong:
            differences["the order of tokens"] = max(wrong)
        swapped = max(difference(a, b) for a, b in zip(found, alone, strict=True))
        checks.append(Check(tuple(image.shape), differences, swapped))
    return checks


@contextlib.contextmanager
def ranked(orders: Sequence[Tensor]) -> Iterator[list[float]]:
    """Inside, networks sort tokens in the given orders, block by block, checked against their significance.

    Yields a list that collects every step in the wrong direction larger than :data:`EQUAL`.
    """
    given, wrong, sort = iter(orders), [], ops.sort_tokens

    def sort_as_given(significance: Tensor) -> Tensor:
        order = next(given, None)
        if order is None or order.shape != significance.shape:
            wrong.append(float("inf"))
            return sort(significance)
        steps = significance.gather(1, order).diff(dim=1)
        back = float((-steps).clamp(min=0).max() / significance.abs().max().clamp(min=1e-30)) if steps.numel() else 0.0
        everyone = torch.arange(order.shape[1]).expand_as(order)
        if back > EQUAL or not torch.equal(order.sort(1).values, everyone):
            wrong.append(max(back, TOLERANCE * 2))
        return order

    ops.sort_tokens = sort_as_given
    try:
        yield wrong
    finally:
        ops.sort_tokens = sort


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value; infinite if shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found - expected).abs().max() / scale)


def _fixed_size(graph: Graph, requested: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """The fixed size of a file; None if it is open."""
    trained = graph.about["image_size"]
    if requested is None and not graph.whole_image:
        if reason := graph.why_fixed_size():
            shown = "x".join(map(str, height_and_width(trained)))
            raise UserError(f"--image-size is needed: {reason}, so the file takes one size only (trained at {shown})")
        return None
    if requested is None:
        requested = trained if isinstance(trained, int) else max(trained)
        requested = -(-requested // 32) * 32
    height, width = map(int, height_and_width(requested))
    patches = not any(isinstance(module, SGFormer) for module in graph.modules())  # which need not divide 32
    if (not patches or (height, width) != height_and_width(trained)) and (
        min(height, width) < 32 or height % 32 or width % 32
    ):
        raise UserError(f"--image-size must be multiples of 32 pixels, got {requested}")
    return height, width


def _shapes(graph: Graph, size: tuple[int, int] | None, step: int) -> Sequence[tuple[int, int, int]]:
    if size is None:
        return CHECKED + (CHECKED_ODD if step == 1 else ())
    return [(1, *size)] * 2 if graph.whole_image else [(1, *size), (3, *size)]
