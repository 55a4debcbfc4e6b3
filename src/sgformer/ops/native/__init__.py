"""Operations compiled on this machine: what PyTorch has no good kernel for, fused, for inference on the CPU in float32.

kernels.cpp is compiled by the machine's own C++ compiler the first time that someone asks for it (two seconds), for its
own processor, and kept in ``$XDG_CACHE_HOME/sgformer`` (``~/.cache/sgformer``). Nothing here has a gradient, and nothing
is a torch operator: :func:`sgformer.optimize` is what puts these functions into a network.

Legend: B batch, H x W token grid, N = H * W, C channels, h heads, d = C / h. All tensors are float32 and on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
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
    key = hashlib.sha256("\0".join([*command, _processor(), SOURCE.read_text()]).encode()).hexdigest()[:16]
    name = f"kernels-{key}.so"
    try:
        folder = _cache()
        with contextlib.ExitStack() as stack:
            if not (folder / name).is_file():
                try:
                    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                    tempfile.TemporaryFile(dir=folder).close()
                except OSError:  # a home that is read-only or full: compile for this process alone
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                _compile(command, folder / name)
            return _declare(ctypes.CDLL(str(folder / name)))
    except OSError as error:
        raise UnavailableError(f"{error.filename or name}: {error.strerror or error}") from error


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


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgformer"


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
        "depthwise_gelu": [p, n, n, n, n, p, p],
        "depthwise_add": [p, n, p, n, n, n, n, p, p],
        "layer_norm": [p, p, p, n, n, p, p, f, i],
        "group_norm": [p, n, n, n, p, p, f, i],
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


def panels(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a linear map as :func:`linear` wants them."""
    width = weight.shape[0]
    more = -width % lanes()
    weight = F.pad(weight.detach().float(), (0, 0, 0, more))
    bias = F.pad(weight.new_zeros(width) if bias is None else bias.detach().float(), (0, more))
    return torch.cat([part.t().flatten() for part in weight.split(library().sgformer_panel())]), bias


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, width: int, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Linear map of (B, H, W, n), or a slice of its channels, to (B, H, W, width), plus ``add`` of that shape.

    ``out`` is overwritten; it may be ``add``. ``weight`` and ``bias`` come from :func:`panels`.
    """
    B, H, W, n = x.shape
    out = torch.empty(B, H, W, width) if out is None else out
    library().sgformer_linear(
        x.data_ptr(), _row_stride(x), weight.data_ptr(), bias.data_ptr(),
        None if add is None else add.data_ptr(), 0 if add is None else _row_stride(add),
        out.data_ptr(), _row_stride(out), B * H * W, n, width,
    )  # fmt: skip
    return out


def conv(x: Tensor, weight: Tensor, bias: Tensor, width: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Convolution of (B, H, W, C), contiguous, to (B, ceil(H / stride), ceil(W / stride), width); zeros lie outside.

    ``weight`` and ``bias`` come from :func:`panels` of a convolution's weight permuted to (width, row, column, C).
    """
    B, H, W, C = _contiguous(x).shape
    rows, cols = -(-H // stride), -(-W // stride)
    out = torch.empty(B, rows, cols, width)
    library().sgformer_conv(
        x.data_ptr(), B, H, W, C, kernel, stride, padding,
        weight.data_ptr(), bias.data_ptr(), out.data_ptr(), rows, cols, width,
    )  # fmt: skip
    return out


def winograd_panels(weight: Tensor) -> Tensor:
    """Weight (width, C, 3, 3) of a convolution as :func:`winograd` wants it: 16 matrices, each as of :func:`panels`."""
    g = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    matrices = torch.einsum("ri,oxij,cj->rcox", g, weight.detach().double(), g).flatten(0, 1)
    return torch.stack([panels(matrix.float(), None)[0] for matrix in matrices])


def winograd(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """3 x 3 convolution of (B, H, W, C), contiguous, to (B, H, W, width), zero padding; C and width multiples of :func:`lanes`."""
    B, H, W, C = _contiguous(x).shape
    out = torch.empty(B, H, W, width)
    library().sgformer_winograd(x.data_ptr(), B, H, W, C, weight.data_ptr(), out.data_ptr(), width)
    return out


def depthwise_halve(x: Tensor, weight: Tensor) -> Tensor:
    """3 x 3 depthwise convolution of (B, H, W, C), contiguous, with stride 2 and zero padding; weight (9, C)."""
    B, H, W, C = _contiguous(x).shape
    out = torch.empty(B, -(-H // 2), -(-W // 2), C)
    library().sgformer_depthwise_halve(x.data_ptr(), B, H, W, C, weight.data_ptr(), out.data_ptr())
    return out


def depthwise_gelu_(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of the depthwise convolution of (B, H, W, C), contiguous, in place; weight (9, C), bias (C,)."""
    B, H, W, C = _contiguous(h).shape
    library().sgformer_depthwise_gelu(h.data_ptr(), B, H, W, C, weight.data_ptr(), bias.data_ptr())
    return h


def depthwise_add_(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``out`` (B, H, W, C), contiguous, plus the depthwise convolution of ``x``, its like or a slice of channels."""
    B, H, W, C = _contiguous(out).shape
    library().sgformer_depthwise_add(
        x.data_ptr(), _row_stride(x), out.data_ptr(), B, H, W, C, weight.data_ptr(), bias.data_ptr()
    )
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """LayerNorm over the last dimension, and a GELU where asked for; ``add`` is first added to ``x`` in place."""
    out = torch.empty_like(_contiguous(x))
    C = x.shape[-1]
    more = None if add is None else _contiguous(add).data_ptr()
    library().sgformer_layer_norm(
        x.data_ptr(), more, out.data_ptr(), x.numel() // C, C, weight.data_ptr(), bias.data_ptr(), eps, gelu
    )
    return out


def group_norm_(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Tensor:
    """GroupNorm with one group of (B, H, W, C), contiguous, in place, and a GELU where asked for."""
    B, H, W, C = _contiguous(x).shape
    library().sgformer_group_norm(x.data_ptr(), B, H * W, C, weight.data_ptr(), bias.data_ptr(), eps, gelu)
    return x


def attend_windows(
    q: Tensor,
    kv: Tensor,
    heads: int,
    q_window: tuple[int, int],
    kv_window: tuple[int, int],
    out: Tensor,
    spread: int = 0,
) -> Tensor | None:
    """:func:`sgformer.ops.attend_windows`, with the output written to ``out``, which may be a slice of channels.

    Returns significance (B, H, W): of each token, the attention that its key received, averaged over heads and over the
    queries of a whole window. Keys lie ``spread`` times as coarse as queries; 0: they do not, and None is returned.
    """
    B, H, W, D = q.shape
    Hk, Wk = kv.shape[1:3]
    received = torch.empty(B, H, W) if spread else None
    library().sgformer_attend(
        q.data_ptr(), _row_stride(q), kv.data_ptr(), _row_stride(kv), out.data_ptr(), _row_stride(out),
        B, H, W, Hk, Wk, *q_window, *kv_window, heads, D // heads,
        None if received is None else received.data_ptr(), spread,
    )  # fmt: skip
    return received


def attend(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """Attention of queries (B, H, W, C) to all keys and values (B, M, 2 C); (B, H, W, C)."""
    out = torch.empty(q.shape)
    attend_windows(q, kv[:, None], heads, (q.shape[1], q.shape[2]), (1, kv.shape[1]), out)
    return out


def sort_tokens(significance: Tensor) -> Tensor:
    """:func:`sgformer.ops.sort_tokens`."""
    B, N = _contiguous(significance).shape
    order = torch.empty(B, N, dtype=torch.int64)
    library().sgformer_order(significance.data_ptr(), B, N, order.data_ptr())
    return order


def aggregate(x: Tensor, groups: Sequence[Tensor], weights: Sequence[Tensor], bias: Sequence[Tensor]) -> Tensor:
    """:func:`sgformer.ops.aggregate`."""
    B, N, C = _contiguous(x).shape
    total = sum(group.shape[1] for group in groups)
    out, at = torch.empty(B, total, C), 0
    for group, weight, b in zip(groups, weights, bias, strict=True):
        _, count, rate = group.shape
        if group.stride()[1:] != (rate, 1):
            group = group.contiguous()
        library().sgformer_aggregate(
            x.data_ptr(), B, N, C, group.data_ptr(), group.stride(0), count, rate,
            weight.data_ptr(), b.data_ptr(), out.data_ptr(), total, at,
        )  # fmt: skip
        at += count
    return out


def _contiguous(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise ValueError(f"must be contiguous (got strides {x.stride()} of shape {tuple(x.shape)})")
    return x


def _row_stride(x: Tensor) -> int:
    """Distance between tokens of (B, H, W, C), which must be a slice of channels of a contiguous tensor."""
    if x.is_contiguous():
        return x.shape[3]
    B, H, W, C = x.shape
    stride = x.stride(2) if W > 1 else x.stride(1) if H > 1 else x.stride(0) if B > 1 else C
    expected = (H * W * stride, W * stride, stride, 1)
    if any(n > 1 and s != e for n, s, e in zip(x.shape, x.stride(), expected, strict=True)):
        raise ValueError(f"must be a slice of channels of (B, H, W, C) (got strides {x.stride()} of {tuple(x.shape)})")
    return stride
