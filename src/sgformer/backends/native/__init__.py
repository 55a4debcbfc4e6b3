"""Operations compiled on this machine, fused, and whole blocks of them: on the CPU in float32.

kernels.cpp is compiled by the machine's own C++ compiler, for its own processor, the first time that someone asks
(a few seconds), and kept in ``$XDG_CACHE_HOME/sgformer`` (``~/.cache/sgformer``). Nothing here is known to autograd,
and nothing is a torch operator: :func:`sgformer.optimize` puts these functions into a network for inference, and
:func:`sgformer.accelerate` for training.

Legend: B batch, H x W token grid, N = H * W, C channels, h heads, d = C / h. All tensors are float32 and on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
# No -ffast-math: rounding by a large constant, which exp() needs, would be optimised away.
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi")
# x86 compilers mean by -mcpu something else than others do.
PROCESSOR = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
LONGEST = 120  # seconds for the compiler
PART = 1 << 21  # floats: of tensors larger than these 8 MiB, callers take fewer images at a time


class UnavailableError(RuntimeError):
    """The kernels cannot be compiled here; one line says why."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, compiled now if they are not in the cache.

    Raises:
        UnavailableError: there is no C++ compiler with OpenMP, it failed, or the result cannot be loaded.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++", "clang++"))), None)
    if compiler is None:
        raise UnavailableError("there is no C++ compiler (tried $CXX, g++, c++, clang++)")
    command = [compiler, *FLAGS, PROCESSOR]
    try:
        made_by = os.stat(compiler)  # another version of it, another file
        marks = [*command, str(made_by.st_size), str(made_by.st_mtime_ns), _processor(), SOURCE.read_text()]
        name = f"kernels-{hashlib.sha256(chr(0).join(marks).encode()).hexdigest()[:16]}.so"
        folder = _cache()
        if folder is not None and (folder / name).is_file():
            with contextlib.suppress(OSError):  # damaged: it is made anew
                return _declare(ctypes.CDLL(str(folder / name)))
        with contextlib.ExitStack() as stack:
            if folder is None or not _can_write(folder):  # compiled for this process alone
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _compile(command, folder / name)
            return _declare(ctypes.CDLL(str(folder / name)))
    except OSError as error:
        raise UnavailableError(f"{error.filename or SOURCE.name}: {error.strerror or error}") from error


def _compile(command: Sequence[str], file: Path) -> None:
    # Under another name first: processes that start together must not load what another has half written.
    handle, name = tempfile.mkstemp(suffix=".so", dir=file.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, str(SOURCE), "-o", name], capture_output=True, text=True, timeout=LONGEST, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no reason given"]
            raise UnavailableError(f"{command[0]} failed: {lines[0][:200]}")
        os.replace(name, file)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{command[0]} gave no result within {LONGEST} s") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _cache() -> Path | None:
    """The folder that is kept; None where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgformer"
    except RuntimeError:
        return None


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _processor() -> str:
    """What decides which instructions there are: homes are shared between machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))})
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    p, n, f, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    for name, types in {
        "linear": [p, n, p, p, p, n, p, n, n, n, n],
        "conv": [p, *[n] * 7, p, p, p, n, n, n],
        "winograd": [p, n, n, n, n, p, p, n],
        "depthwise_halve": [p, n, n, n, n, p, p],
        "depthwise_gelu": [p, p, n, n, n, n, p, p],
        "depthwise_backward": [p, n, p, n, p, n, p, n, n, n, n, p, p, p],
        "winograd_gradient": [p, p, n, n, n, n, p, n],
        "group_norm_backward": [p, p, p, n, n, n, p, p, f, i, p, p],
        "aggregate_backward": [p, p, n, n, n, p, n, n, n, p, p, p, p, n, n],
        "attend_backward": [p, n, p, n, p, n, p, n, p, n, *[n] * 11],
        "pack": [p, n, n, n, p],
        "linear_gradient": [p, n, p, n, p, p, n, n, n, i],
        "conv_gradient": [p, p, *[n] * 9, p, n],
        "depthwise_add": [p, n, p, n, n, n, n, p, p],
        "layer_norm": [p, p, n, n, p, p, f, i],
        "layer_norm_backward": [p, p, p, p, n, n, p, f, p, p],
        "group_norm": [p, p, n, n, n, p, p, f, i],
        "hybrid_block": [p, p, n, n, n, p, p, p, p, p, f, f],
        "guided_block": [p, p, n, p, p, p, p, p, f],
        "plain_block": [p, p, p, p, p, f],
        "attend": [p, n, p, n, p, n, *[n] * 11, p, n],
        "order": [p, n, n, p],
        "aggregate": [p, n, n, n, p, n, n, n, p, p, p, n, n],
    }.items():
        function = getattr(library, f"sgformer_{name}")
        function.argtypes, function.restype = types, None
    for name in ("lanes", "panel"):
        getattr(library, f"sgformer_{name}").restype = n
    return library


def lanes() -> int:
    """Floats in a vector of this processor."""
    return library().sgformer_lanes()


def tap_major(weight: Tensor) -> Tensor:
    """The kernel of a 3 x 3 depthwise convolution, (C, 1, 3, 3), as the functions here want it: (9, C)."""
    return weight.detach().flatten(1).t().contiguous()


def taps_plus_input(weight: Tensor) -> Tensor:
    """:func:`tap_major` of x + depthwise(x): 1 is added to the centre tap."""
    taps = tap_major(weight).clone()
    taps[4] += 1
    return taps


def panels(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a linear map as :func:`linear` wants them."""
    return pack(weight.detach()), padded(bias, weight.shape[0])


def pack(weight: Tensor, transposed: bool = False) -> Tensor:
    """Weight (out, in) of a linear map as :func:`linear` wants it; ``transposed``, of the map from (out) to (in)."""
    width, n = _checked(weight := weight.contiguous()).shape
    across, down = (n, width) if transposed else (width, n)
    packed = _fresh(weight, down * (across + -across % lanes()))
    library().sgformer_pack(weight.data_ptr(), width, n, transposed, packed.data_ptr())
    return packed


def padded(bias: Tensor | None, width: int) -> Tensor:
    """Bias (width,) of a linear map, or zeros, as :func:`linear` wants it."""
    bias = torch.zeros(width, dtype=torch.float32, device="cpu") if bias is None else bias.detach()
    more = -width % lanes()
    return F.pad(bias, (0, more)) if more else bias


def conv_panels(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight (width, C, k, k) and bias of a convolution as :func:`conv` wants them."""
    return panels(weight.detach().permute(0, 2, 3, 1).flatten(1), bias)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, width: int, out: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """Linear map of (B, H, W, n), contiguous, to (B, H, W, width). ``weight`` and ``bias`` come from :func:`panels`.

    ``out``: memory for the result, contiguous; ``add``: what is added to it, of its shape.
    """
    B, H, W, n = _checked(x).shape
    out = _fresh(x, B, H, W, width) if out is None else _checked(out)
    library().sgformer_linear(
        x.data_ptr(), n, weight.data_ptr(), bias.data_ptr(), None if add is None else _checked(add).data_ptr(), width,
        out.data_ptr(), width, B * H * W, n, width,
    )  # fmt: skip
    return out


def conv(x: Tensor, weight: Tensor, bias: Tensor, width: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Convolution of (B, H, W, C), contiguous, to (B, ceil(H / stride), ceil(W / stride), width); zeros lie outside.

    ``weight`` and ``bias`` come from :func:`conv_panels`.
    """
    B, H, W, C = _checked(x).shape
    rows, cols = -(-H // stride), -(-W // stride)
    out = _fresh(x, B, rows, cols, width)
    library().sgformer_conv(
        x.data_ptr(), B, H, W, C, kernel, stride, padding,
        weight.data_ptr(), bias.data_ptr(), out.data_ptr(), rows, cols, width,
    )  # fmt: skip
    return out


#: Of Winograd's F(2 x 2, 3 x 3).
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def winograd_panels(weight: Tensor) -> Tensor:
    """Weight (width, C, 3, 3) of a convolution as :func:`winograd` wants it: 16 matrices, each as of :func:`panels`."""
    g = torch.tensor(_G, dtype=torch.float64, device="cpu")
    matrices = torch.einsum("ri,oxij,cj->rcox", g, weight.detach().double(), g).flatten(0, 1)
    return torch.stack([pack(matrix.float()) for matrix in matrices])


def winograd(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """3 x 3 convolution of (B, H, W, C), contiguous, to (B, H, W, width), with zeros around.

    C and width must be multiples of :func:`lanes`; ``weight`` comes from :func:`winograd_panels`.
    """
    B, H, W, C = _checked(x).shape
    out = _fresh(x, B, H, W, width)
    library().sgformer_winograd(x.data_ptr(), B, H, W, C, weight.data_ptr(), out.data_ptr(), width)
    return out


def depthwise_halve(x: Tensor, weight: Tensor) -> Tensor:
    """3 x 3 depthwise convolution of (B, H, W, C), contiguous, with stride 2 and zero padding; weight (9, C)."""
    B, H, W, C = _checked(x).shape
    out = _fresh(x, B, -(-H // 2), -(-W // 2), C)
    library().sgformer_depthwise_halve(x.data_ptr(), B, H, W, C, weight.data_ptr(), out.data_ptr())
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension of a contiguous tensor."""
    out, C = _fresh(_checked(x), *x.shape), x.shape[-1]
    library().sgformer_layer_norm(
        x.data_ptr(), out.data_ptr(), x.numel() // C, C, weight.data_ptr(), bias.data_ptr(), eps, False
    )
    return out


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool, inplace: bool = False) -> Tensor:
    """GroupNorm with one group of (B, H, W, C), contiguous, and a GELU where asked for."""
    B, H, W, C = _checked(x).shape
    out = x if inplace else _fresh(x, B, H, W, C)
    library().sgformer_group_norm(
        x.data_ptr(), out.data_ptr(), B, H * W, C, weight.data_ptr(), bias.data_ptr(), eps, gelu
    )
    return out


def sort_tokens(significance: Tensor) -> Tensor:
    """:func:`sgformer.ops.sort_tokens`."""
    B, N = _checked(significance).shape
    order = torch.empty(B, N, dtype=torch.int64, device="cpu")
    library().sgformer_order(significance.data_ptr(), B, N, order.data_ptr())
    return order


def depthwise_gelu(h: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU of the 3 x 3 depthwise convolution of (B, H, W, C), contiguous; weight (9, C). ``out`` may be h."""
    B, H, W, C = _checked(h).shape
    out = _fresh(h, B, H, W, C) if out is None else _checked(out)
    library().sgformer_depthwise_gelu(h.data_ptr(), out.data_ptr(), B, H, W, C, weight.data_ptr(), bias.data_ptr())
    return out


def depthwise_add(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Adds the 3 x 3 depthwise convolution of x, (B, H, W, C), to ``out``, contiguous; weight (9, C)."""
    B, H, W, C = _checked(out).shape
    library().sgformer_depthwise_add(
        x.data_ptr(), _stride(x), out.data_ptr(), B, H, W, C, weight.data_ptr(), bias.data_ptr()
    )


def attend(
    q: Tensor,
    kv: Tensor,
    heads: int,
    q_window: tuple[int, int],
    kv_window: tuple[int, int],
    out: Tensor,
    spread: int = 0,
) -> Tensor | None:
    """Attention of queries (B, H, W, D) to keys and values (B, H', W', 2 D), window by window, into ``out``.

    With ``spread``, how many times as coarse the grid of keys is, also the significance of every token (B, H, W): the
    attention that its key received, averaged over heads and the queries of a whole window.
    """
    B, H, W, D = q.shape
    received = _fresh(q, B, H, W) if spread else None
    library().sgformer_attend(
        q.data_ptr(), _stride(q), kv.data_ptr(), _stride(kv), out.data_ptr(), _stride(out), B, H, W, *kv.shape[1:3],
        *q_window, *kv_window, heads, D // heads, None if received is None else received.data_ptr(), spread,
    )  # fmt: skip
    return received


def aggregate(x: Tensor, groups: Sequence[Tensor], weights: Sequence[Tensor], bias: Sequence[Tensor]) -> Tensor:
    """:func:`sgformer.ops.aggregate`, of contiguous x."""
    B, N, C = _checked(x).shape
    M, at = sum(group.shape[1] for group in groups), 0
    out = _fresh(x, B, M, C)
    for group, w, b in zip(groups, weights, bias, strict=True):
        _, count, rate = group.shape
        if group.stride()[1:] != (rate, 1):
            raise ValueError(f"the members of a group must lie side by side (got strides {group.stride()})")
        library().sgformer_aggregate(
            x.data_ptr(), B, N, C, group.data_ptr(), group.stride(0), count, rate, w.data_ptr(), b.data_ptr(),
            out.data_ptr(), M, at,
        )  # fmt: skip
        at += count
    return out


# -- gradients --------------------------------------------------------------------------------------------------


def linear_gradient(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add: bool = False) -> None:
    """Gradients of a linear map into ``weight`` (out, in) and ``bias`` (out,), from that of its result (..., out) and
    from its input (..., in); with ``add``, they are added to what is there."""
    width, n = _checked(weight).shape
    library().sgformer_linear_gradient(
        _checked(gradient).data_ptr(), width, _checked(x).data_ptr(), n, weight.data_ptr(),
        None if bias is None else bias.data_ptr(), x.numel() // n, n, width, add,
    )  # fmt: skip


def conv_gradient(gradient: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Of the weight (width, C, k, k) of :func:`conv`, from that of its result and from its input.

    C must be a multiple of :func:`lanes`.
    """
    (B, H, W, C), (_, rows, cols, width) = _checked(x).shape, _checked(gradient).shape
    made = _fresh(x, kernel, kernel, width, C)
    library().sgformer_conv_gradient(
        x.data_ptr(), gradient.data_ptr(), B, H, W, C, kernel, stride, padding, rows, cols, made.data_ptr(), width
    )
    return made.permute(2, 3, 0, 1).contiguous()


def winograd_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Of the weight (width, C, 3, 3) of :func:`winograd`, from that of its result and from its input."""
    (B, H, W, C), width = _checked(x).shape, _checked(gradient).shape[-1]
    made = _fresh(x, 4, 4, width, C)
    library().sgformer_winograd_gradient(x.data_ptr(), gradient.data_ptr(), B, H, W, C, made.data_ptr(), width)
    g = torch.tensor(_G, dtype=torch.float32, device="cpu")
    return torch.einsum("ri,rcox,cj->oxij", g, made, g)


def layer_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, in the place of ``gradient``, the weight and the bias of :func:`layer_norm`.

    ``add`` is added to the first.
    """
    C, g_weight, g_bias = _checked(x).shape[-1], torch.empty_like(weight), torch.empty_like(bias)
    library().sgformer_layer_norm_backward(
        x.data_ptr(), _checked(gradient).data_ptr(), None if add is None else _checked(add).data_ptr(),
        gradient.data_ptr(), x.numel() // C, C, weight.data_ptr(), eps, g_weight.data_ptr(), g_bias.data_ptr(),
    )  # fmt: skip
    return gradient, g_weight, g_bias


def group_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias of :func:`group_norm`."""
    B, H, W, C = _checked(x).shape
    out, g_weight, g_bias = _fresh(x, *x.shape), torch.empty_like(weight), torch.empty_like(bias)
    library().sgformer_group_norm_backward(
        x.data_ptr(), _checked(gradient).data_ptr(), out.data_ptr(), B, H * W, C, weight.data_ptr(), bias.data_ptr(),
        eps, gelu, g_weight.data_ptr(), g_bias.data_ptr(),
    )  # fmt: skip
    return out, g_weight, g_bias


def aggregate_backward(
    gradient: Tensor, x: Tensor, groups: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the weights and of the biases of :func:`aggregate`; that of x is added to ``out``."""
    B, N, C = _checked(x).shape
    M, at = _checked(gradient).shape[1], 0
    g_weights, g_bias = [torch.empty_like(w) for w in weights], [w.new_empty(1) for w in weights]
    for group, w, g_w, g_b in zip(groups, weights, g_weights, g_bias, strict=True):
        _, count, rate = group.shape
        library().sgformer_aggregate_backward(
            x.data_ptr(), gradient.data_ptr(), B, N, C, group.data_ptr(), group.stride(0), count, rate, w.data_ptr(),
            _checked(out).data_ptr(), g_w.data_ptr(), g_b.data_ptr(), M, at,
        )  # fmt: skip
        at += count
    return g_weights, g_bias


def depthwise_backward(
    h: Tensor, gradient: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None, a: Tensor | None = None
) -> Tensor:
    """The gradient of a depthwise convolution's input, into ``out``, from that of its result; all (B, H, W, C).

    With ``bias`` and ``a``, of :func:`depthwise_gelu`, whose result is written into ``a``. ``out`` may be ``gradient``.

    Returns:
        (10, C): gradients of the 9 taps and of the bias.
    """
    B, H, W, C = h.shape
    made = _fresh(h, B, 10, C)
    library().sgformer_depthwise_backward(
        h.data_ptr(), _stride(h), gradient.data_ptr(), _stride(gradient), out.data_ptr(), _stride(out),
        None if a is None else _checked(a).data_ptr(), B, H, W, C, weight.data_ptr(),
        None if bias is None else bias.data_ptr(), made.data_ptr(),
    )  # fmt: skip
    return made.sum(0)


def attend_backward(
    q: Tensor,
    kv: Tensor,
    gradient: Tensor,
    q_out: Tensor,
    kv_out: Tensor,
    heads: int,
    q_window: tuple[int, int],
    kv_window: tuple[int, int],
) -> None:
    """Gradients of q and kv of :func:`attend`, into ``q_out`` and ``kv_out``, from that of its result."""
    B, H, W, D = q.shape
    library().sgformer_attend_backward(
        q.data_ptr(), _stride(q), kv.data_ptr(), _stride(kv), gradient.data_ptr(), _stride(gradient), q_out.data_ptr(),
        _stride(q_out), kv_out.data_ptr(), _stride(kv_out), B, H, W, *kv.shape[1:3], *q_window, *kv_window, heads,
        D // heads,
    )  # fmt: skip


# -- whole blocks -----------------------------------------------------------------------------------------------
#
# ``parts``: parameters in the order that kernels.cpp names, linear maps as of `panels`, 3 x 3 kernels of `tap_major`.


def hybrid_block(
    x: Tensor,
    parts: Sequence[Tensor],
    hidden: int,
    heads: int,
    reduction: int,
    window: int,
    is_global: bool,
    eps: float,
    reduce_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:class:`~sgformer.models.backbone.HybridBlock`: (B, H, W, C) to the same, and its two maps (B, H, W)."""
    B, H, W, C = _checked(x).shape
    reduced = B * -(-H // reduction) * -(-W // reduction)
    out, coarse, fine = _fresh(x, *x.shape), _fresh(x, B, H, W), _fresh(x, B, H, W)
    scratch = _fresh(x, B * H * W * (2 * C + max(hidden, 3 * C)) + 2 * reduced * C)
    library().sgformer_hybrid_block(
        _pointers(parts), _numbers(B, H, W, C, hidden, heads), reduction, window, is_global, x.data_ptr(),
        out.data_ptr(), coarse.data_ptr(), fine.data_ptr(), scratch.data_ptr(), eps, reduce_eps,
    )  # fmt: skip
    return out, coarse, fine


def guided_block(
    x: Tensor,
    significance: Tensor,
    parts: Sequence[Tensor],
    hidden: int,
    heads: int,
    regions: Sequence[tuple[int, int]],
    eps: float,
) -> Tensor:
    """:class:`sgformer.models.backbone.GuidedBlock`: (B, H, W, C) to the same; length and rate of every region."""
    B, H, W, C = _checked(x).shape
    if _checked(significance).shape != (B, H, W):
        raise ValueError(f"significance must be {(B, H, W)} (got {tuple(significance.shape)})")
    few = sum(-(-length // rate) for length, rate in regions)
    out, scratch = _fresh(x, *x.shape), _fresh(x, B * H * W * (2 * C + max(hidden, 2 * C)) + 3 * B * few * C)
    library().sgformer_guided_block(
        _pointers(parts), _numbers(B, H, W, C, hidden, heads), len(regions), _numbers(*itertools.chain(*regions)),
        x.data_ptr(), significance.data_ptr(), out.data_ptr(), scratch.data_ptr(), eps,
    )  # fmt: skip
    return out


def plain_block(x: Tensor, parts: Sequence[Tensor], hidden: int, heads: int, eps: float) -> Tensor:
    """:class:`sgformer.models.backbone.PlainBlock`: (B, H, W, C) to the same."""
    B, H, W, C = _checked(x).shape
    out, scratch = _fresh(x, *x.shape), _fresh(x, B * H * W * (2 * C + max(hidden, 4 * C)))
    numbers = _numbers(B, H, W, C, hidden, heads)
    library().sgformer_plain_block(_pointers(parts), numbers, x.data_ptr(), out.data_ptr(), scratch.data_ptr(), eps)
    return out


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _checked(x: Tensor) -> Tensor:
    """What the kernels read as float32, one after the other, must be that."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous():
        raise ValueError(
            f"native kernels take contiguous float32 on the CPU (got {x.dtype} on {x.device}, shape {tuple(x.shape)}, "
            f"strides {x.stride()})"
        )
    return x


def _stride(x: Tensor) -> int:
    """From one token of (B, H, W, C) to the next: of a slice of channels, the channels of the whole."""
    _, H, W, _ = x.shape
    step: int = x.stride(2)
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.stride() != (H * W * step, W * step, step, 1):
        raise ValueError(
            f"native kernels take float32 on the CPU, channels of a contiguous (B, H, W, C) (got {x.dtype} on "
            f"{x.device}, shape {tuple(x.shape)}, strides {x.stride()})"
        )
    return step


def _fresh(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape)  # of x's own kind, whatever torch's defaults are
