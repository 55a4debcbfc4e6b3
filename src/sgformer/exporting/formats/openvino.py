"""OpenVINO's intermediate representation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgformer.core.errors import require
from sgformer.core.files import to_json
from sgformer.exporting.formats import ExportFormat, Runner, register_export
from sgformer.exporting.formats.onnx import OnnxFormat
from sgformer.exporting.graphs import Graph


@register_export("openvino")
class OpenVinoFormat(ExportFormat):
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
        model.set_rt_info(to_json(about, None), ["sgformer"])
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
