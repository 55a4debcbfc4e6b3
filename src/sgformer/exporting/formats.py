"""Writing a graph in a format, and running the file in that format's own runtime."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgformer.backends.traceable import traceable
from sgformer.core.errors import UserError, require
from sgformer.exporting.graphs import Graph

#: Runs a file: (B, 3, H, W) -> every output in order, and the order of tokens in every self-guided block, (B, N) int64.
Runner = Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]

OPSET = 17  # the last one of the tracing exporter


class OnnxFormat:
    """One .onnx file, for onnxruntime and whatever else reads ONNX.

    Written by torch's tracing exporter: it follows sizes as tensors, so that all may stay open, and torchvision's
    detectors are made for it. The newer one keeps sizes as formulas; for these networks they grow for minutes.
    """

    suffix = ".onnx"
    any_size = True

    def require(self) -> None:
        for package in ("onnx", "onnxruntime"):
            require(package, extra="export")

    def write(self, graph: Graph, example: Tensor, size: Any, about: dict[str, Any], path: Path) -> list[Path]:
        """The files written.

        Args:
            example: an image to follow.
            size: the one (height, width) to take; None for any.
            about: what the file is to say of itself.
        """
        import onnx

        image = {} if graph.whole_image else {0: "batch"}
        image |= {} if size else {2: "height", 3: "width"}
        axes = {"image": image, **graph.axes(open_size=not size)}
        with quiet(), torch.no_grad():
            torch.onnx.export(
                traceable(graph, "topk", fixed=bool(size)),
                (example,),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=graph.names,
                dynamic_axes=axes,
            )
        model = onnx.load(path)
        set_onnx_metadata(model, about)
        onnx.save(model, path)
        return [path]

    def open(self, path: Path) -> Runner:
        import onnx

        model = onnx.load(path)
        given = len(model.graph.output)
        sorts = [node.output[1] for node in model.graph.node if node.op_type == "TopK"]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorts)
        session = onnx_session(model.SerializeToString())

        def run(image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            found = [torch.from_numpy(np.asarray(x)) for x in session.run(None, {"image": image.numpy()})]
            return found[:given], found[given:]

        return run


class TorchFormat:
    """torch.export's program in one .pt2 file: `torch.export.load`."""

    suffix = ".pt2"
    any_size = False

    def require(self) -> None:
        pass

    def write(self, graph: Graph, example: Tensor, size: Any, about: dict[str, Any], path: Path) -> list[Path]:
        axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
        if size is None:
            # 32 times a whole number, so that every stage's grid follows without remainder.
            axes |= {2: 32 * torch.export.Dim("rows", min=1), 3: 32 * torch.export.Dim("columns", min=1)}
        with quiet(), torch.no_grad():
            copy = traceable(graph, fixed=bool(size))
            program = torch.export.export(copy, (example,), dynamic_shapes=(axes,), strict=False)
            torch.export.save(program, path, extra_files={"sgformer.json": json.dumps(about)})
        return [path]

    def open(self, path: Path) -> Runner:
        with quiet():
            # Guards: torch.export would rule out a batch of one, only because it would choose other kernels for it.
            program = torch.export.load(path).module(check_guards=False)

        def run(image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            follower = SortFollower(program)
            with torch.no_grad():
                return list(follower.run(image)), follower.orders

        return run


class SortFollower(torch.fx.Interpreter):
    """Runs a program and keeps what it sorted."""

    def __init__(self, program: Any):
        super().__init__(program)
        self.orders: list[Tensor] = []

    def run_node(self, node: Any) -> Any:
        result = super().run_node(node)
        if node.op == "call_function" and "sort" in str(node.target):
            self.orders.append(result[1] if isinstance(result, tuple) else result)
        return result


class OpenVinoFormat:
    """OpenVINO's .xml and, beside it, .bin; converted from ONNX."""

    suffix = ".xml"
    any_size = True

    def require(self) -> None:
        OnnxFormat().require()
        require("openvino", extra="export")

    def write(self, graph: Graph, example: Tensor, size: Any, about: dict[str, Any], path: Path) -> list[Path]:
        import openvino

        between = path.with_suffix(".onnx")
        try:
            OnnxFormat().write(graph, example, size, about, between)
            model = openvino.convert_model(between)
        finally:
            between.unlink(missing_ok=True)
        model.set_rt_info(json.dumps(about), ["sgformer"])
        openvino.save_model(model, path, compress_to_fp16=False)
        return [path, path.with_suffix(".bin")]

    def open(self, path: Path) -> Runner:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        given = len(model.outputs)
        model.add_outputs([op.output(1) for op in model.get_ordered_ops() if op.get_type_name() == "TopK"])
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = core.compile_model(model, "CPU", settings)

        def run(image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            values = compiled({"image": image.numpy()})
            found = [torch.from_numpy(values[i].copy()) for i in range(len(compiled.outputs))]
            return found[:given], [order.long() for order in found[given:]]

        return run


FORMATS: dict[str, Any] = {"onnx": OnnxFormat(), "torch-export": TorchFormat(), "openvino": OpenVinoFormat()}


def onnx_session(model: Path | bytes, threads: int | None = None) -> Any:
    """onnxruntime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def set_onnx_metadata(model: Any, about: dict[str, Any]) -> None:
    """Everything as JSON under "sgformer"; what other tools look for by itself, too."""
    values = {"sgformer": about, **{key: about[key] for key in ("task", "classes", "mean", "std", "image_size")}}
    del model.metadata_props[:]
    for key, value in values.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    model.producer_name = "sgformer"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk much of what is of no use to whoever exports."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def check_suffix(path: Path, name: str) -> None:
    """Raise UserError unless the file is called as files of the format are."""
    if path.suffix != FORMATS[name].suffix:
        raise UserError(f"{path}: a file of format {name} ends in {FORMATS[name].suffix}")
