"""ONNX: one file, for onnxruntime and other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgformer.backends.traceable import traceable
from sgformer.core.errors import require
from sgformer.core.files import to_json
from sgformer.exporting.formats import ExportFormat, Runner, register_export
from sgformer.exporting.graphs import Graph
from sgformer.exporting.quiet import quiet

OPSET = 17  # the last one of the tracing exporter


@register_export("onnx")
class OnnxFormat(ExportFormat):
    """One .onnx file, for onnxruntime and other runtimes.

    Written by torch's tracing exporter: it follows sizes as tensors, so that all may stay open, and torchvision's
    detectors are made for it. The newer one keeps sizes as formulas; for these networks they grow for minutes.
    """

    suffix = ".onnx"
    any_size = True

    def require(self) -> None:
        for package in ("onnx", "onnxruntime"):
            require(package, extra="export")

    def write(self, graph: Graph, example: Tensor, size: Any, about: dict[str, Any], path: Path) -> list[Path]:
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


def onnx_session(model: Path | bytes, threads: int | None = None) -> Any:
    """onnxruntime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def set_onnx_metadata(model: Any, about: dict[str, Any]) -> None:
    """Store all metadata as JSON under "sgformer"; entries that other tools read also under their own names."""
    values = {"sgformer": about, **{key: about[key] for key in ("task", "classes", "mean", "std", "image_size")}}
    del model.metadata_props[:]
    for key, value in values.items():
        model.metadata_props.add(key=key, value=to_json(value, None))
    model.producer_name = "sgformer"
