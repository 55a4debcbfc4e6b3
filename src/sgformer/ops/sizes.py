"""Questions about sizes that a compiler or an exporter may not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds, as far as that is known.

    With symbols for sizes (torch.export and torch.compile with dynamic shapes) an `if` would decide by the example and
    bind the graph to sizes like it. Ask for the special case with this, and let the other branch be right for all.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def fixed(size: int) -> bool:
    """Whether a size is a number, not the symbol of a compiler or an exporter."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


def ceil_to(size: int, step: int) -> int:
    """The smallest multiple of `step` that is not below a size, also a symbol.

    Sizes are never negated: in a traced network they are tensors, and ONNX divides negative ones towards zero.
    """
    return (size + step - 1) // step * step


def outside_graph(part: Callable[..., Any], x: torch.Tensor, *args: Any) -> Any:
    """`part(x, *args)`, which a compiler with symbols for the sides of x, (B, H, W, C) or (B, N, C), runs as it is.

    So windows and regions are cut by numbers, and the graph that follows has sizes of its own. As expressions of the
    image's, one for each stage and region, they kept torch's default back end busy for many minutes. Exporters and
    compilers for one size see through it, and a part with the attribute `symbolic` is left to them all.
    """
    seen = torch.compiler.is_exporting() or getattr(part, "symbolic", False)
    if not torch.compiler.is_compiling() or seen or all(map(fixed, x.shape[1:-1])):
        return part(x, *args)
    return _as_it_is(part, x, *args)


@torch.compiler.disable(reason="sizes that follow from those of the image")
def _as_it_is(part: Callable[..., Any], x: torch.Tensor, *args: Any) -> Any:
    result = part(x, *args)
    for each in result:
        for value in each if isinstance(each, list) else [each]:
            torch._dynamo.maybe_mark_dynamic(value, list(range(1, x.ndim - 1)))
    return result
