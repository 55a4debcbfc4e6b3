"""torch.export's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgformer.backends.traceable import traceable
from sgformer.core.files import to_json
from sgformer.exporting.formats import ExportFormat, Runner, register_export
from sgformer.exporting.graphs import Graph
from sgformer.exporting.quiet import quiet


@register_export("torch-export")
class TorchFormat(ExportFormat):
    """torch.export's program in one .pt2 file: `torch.export.load`."""

    suffix = ".pt2"
    whole = False

    def write(self, graph: Graph, example: Tensor, size: Any, about: dict[str, Any], path: Path) -> list[Path]:
        axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
        if size is None:
            # 32 times a whole number, so that every stage's grid follows without remainder.
            axes |= {2: 32 * torch.export.Dim("rows", min=1), 3: 32 * torch.export.Dim("columns", min=1)}
        with quiet(), torch.no_grad():
            copy = traceable(graph, fixed=bool(size))
            program = torch.export.export(copy, (example,), dynamic_shapes=(axes,), strict=False)
            torch.export.save(program, path, extra_files={"sgformer.json": to_json(about, None)})
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
