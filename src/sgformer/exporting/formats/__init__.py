"""The formats that networks are exported to. A new one is a file in this folder, or a plugin; see `register_export`.

Help texts need the names alone: nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sgformer.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from sgformer.exporting.graphs import Graph

#: Runs a file: (B, 3, H, W) -> every output in order, and the order of tokens in every self-guided block, (B, N) int64,
#: or None if unavailable.
Runner = Callable[["Tensor"], "tuple[list[Tensor], list[Tensor] | None]"]

FORMATS = Registry("format", "sgformer.exporting.formats", "register_export")


def register_export(name: str) -> Callable[[Any], Any]:
    """Decorator: add a format under a name, for `sgformer export --format NAME`. It is an :class:`ExportFormat`.

    Raises:
        ValueError: the name is taken by another format.
    """
    return FORMATS.register(name)


class ExportFormat:
    """Writes a graph, and runs the file in the format's own runtime.

    Attributes:
        suffix: of the file's name.
        any_size: whether images of open size may have sides that are not multiples of 32.
        whole: whether it can hold a whole detector, not only its backbone and pyramid.
        folder: whether it is a new folder with the network as it is, for any image size, rather than a file.
    """

    suffix: ClassVar[str]
    any_size: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    folder: ClassVar[bool] = False

    def require(self) -> None:
        """Raise UserError if a package is missing."""

    def write(self, graph: Graph, example: Tensor, size: Any, about: dict[str, Any], path: Path) -> list[Path]:
        """The files written.

        Args:
            graph: as trained; `backends.traceable.traceable` makes it traceable.
            example: an input to trace with, (B, 3, H, W) float32.
            size: the fixed (height, width); None if open.
            about: the metadata to store.
            path: of the first file; others go beside it.
        """
        raise NotImplementedError

    def open(self, path: Path) -> Runner:
        """A runner of the file."""
        raise NotImplementedError
