"""The operations of :class:`sgformer.ops.kernels.Kernels` by Triton's kernels, forward and backward.

Legend as in ``kernels``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgformer.backends.eligibility import observed
from sgformer.backends.triton import interpreted, kernels

Result = TypeVar("Result")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Blocks with more channels need more shared memory than many GPUs have; networks here have 16 to 32 in a head.
WIDEST_HEAD = 64

#: Where there are fewer blocks of keys than this, the queries are divided among several programs each.
PROGRAMS = 512

#: Up to this many keys are one block in the forward pass, whose column sums need no second one.
ONE_BLOCK = 64


def serve(*tensors: Tensor) -> bool:
    """Whether kernels can read tensors, and nobody watches torch's operations."""
    place = "cpu" if interpreted() else "cuda"
    return not observed() and all(
        type(t) in (Tensor, torch.nn.Parameter) and t.device.type == place and t.dtype in DTYPES and t.numel() > 0
        for t in tensors
    )


def _precision() -> str:
    """How tensor cores multiply float32: once in 10 bits if torch may do so, else three times, which makes 21."""
    if interpreted():
        return "interpreted"
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# -- attention ----------------------------------------------------------------------------------------------------


def attention_and_received(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, valid_queries: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`sgformer.ops.attention_and_received`."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, valid, valid_queries)
    return _attend(q, k, v, valid, valid_queries)[:2]


def _on_its_device(function: Callable[..., Result]) -> Callable[..., Result]:
    """Triton starts kernels on the current device, whatever that of the tensors."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any) -> Result:
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return run


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, valid: Any, valid_queries: Any) -> tuple[Tensor, Tensor]:
        out, received, lse = _attend(q, k, v, valid, valid_queries)
        ctx.save_for_backward(q, k, v, valid, out, lse)
        ctx.mark_non_differentiable(received)
        return out, received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return (*_attend_backward(grad, *ctx.saved_tensors), None, None)


def _flags(mask: Tensor | None, spare: Tensor) -> Tensor:
    """A mask as bytes; without one, some tensor that is not read."""
    return spare if mask is None else mask.contiguous().view(torch.uint8)


def _blocks(q: Tensor, M: int) -> tuple[dict[str, Any], int, int]:
    """Sizes of blocks of queries; BLOCK_M, for the forward pass and for others."""
    d = q.shape[-1]
    D = max(16, triton.next_power_of_2(d))
    most = 64 if D * q.element_size() <= 128 else 32
    whole = max(16, triton.next_power_of_2(M))
    sizes = {"d": d, "D": D, "BLOCK_N": most, "PRECISION": _precision()}
    return sizes, whole if whole <= ONE_BLOCK else most, min(whole, most)


def _parts(blocks: int, N: int, block: int) -> tuple[int, int]:
    """Into how many parts queries are divided, and how many of them are in each: whole blocks."""
    parts = max(1, min(PROGRAMS // blocks, triton.cdiv(N, 4 * block)))
    span = triton.cdiv(triton.cdiv(N, parts), block) * block
    return triton.cdiv(N, span), span


@_on_its_device
def _attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, valid_queries: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, h, N, d), the attention received (B, M), and the log-sum-exp (B, h, N) in base 2."""
    (B, h, N, d), M = q.shape, k.shape[2]
    sizes, block, _ = _blocks(q, M)
    whole = block >= M
    queries = triton.cdiv(N, sizes["BLOCK_N"])
    out = q.new_empty(B, N, h, d).transpose(1, 2)  # so that heads join without a copy
    lse = q.new_empty(B, h, N, dtype=torch.float32)
    scale = d**-0.5 * math.log2(math.e)
    masks = _flags(valid, lse), _flags(valid_queries, lse)
    given = {"PADDED": valid is not None, "PARTIAL_QUERIES": valid_queries is not None}
    sums = q.new_empty(B, h, queries, M, dtype=torch.float32) if whole else lse
    kernels.attend[(B * h, queries)](
        *(q, k, v, *masks, out, lse, sums),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], h, N, M, scale),
        **sizes, **given, BLOCK_M=block, WHOLE=whole,
    )  # fmt: skip
    if not whole:
        columns = triton.cdiv(M, block)
        parts, span = _parts(B * h * columns, N, sizes["BLOCK_N"])
        sums = q.new_empty(B, h, parts, M, dtype=torch.float32)
        kernels.receive[(B * h, columns, parts)](
            *(q, k, *masks, lse, sums, *q.stride()[:3], *k.stride()[:3], h, N, M, span, scale),
            **sizes, **given, BLOCK_M=block,
        )  # fmt: skip
    return out, sums.sum(2).mean(1), lse


@_on_its_device
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, h, N, d), M = q.shape, k.shape[2]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    sizes, _, block = _blocks(q, M)
    rows = sizes["BLOCK_N"]
    sizes |= {"BLOCK_M": block, "PADDED": valid is not None}
    factor, scale = d**-0.5, d**-0.5 * math.log2(math.e)
    mask, delta, dq = _flags(valid, lse), torch.empty_like(lse), q.new_empty(B, h, N, d)
    strides = [t.stride()[:3] for t in (q, k, v, out, grad)]
    kernels.attend_backward_queries[(B * h, triton.cdiv(N, rows))](
        q, k, v, mask, out, grad, lse, delta, dq, *sum(strides, ()), h, N, M, scale, factor, **sizes
    )
    columns = triton.cdiv(M, block)
    parts, span = _parts(B * h * columns, N, rows)
    dk, dv = (q.new_empty(B, h, parts, M, d, dtype=torch.float32) for _ in "kv")
    del strides[3]
    kernels.attend_backward_keys[(B * h, columns, parts)](
        q, k, v, mask, grad, lse, delta, dk, dv, *sum(strides, ()), h, N, M, span, scale, factor, **sizes
    )
    return dq, dk.sum(2).to(k.dtype), dv.sum(2).to(v.dtype)


# -- aggregation --------------------------------------------------------------------------------------------------


def aggregate(x: Tensor, groups: Sequence[Tensor], weights: Sequence[Tensor], bias: Sequence[Tensor]) -> Tensor:
    """See :func:`sgformer.ops.aggregate`; in any autocast dtype, of the numbers as they are."""
    x = x.contiguous()
    groups = [i if i.stride()[1:] == (i.shape[2], 1) else i.contiguous() for i in groups]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *bias)):
        return _Aggregate.apply(x, groups, len(weights), *weights, *bias)
    return _aggregate(x, groups, weights, bias)


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: list[Tensor], regions: int, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *groups, *parameters)
        ctx.regions = regions
        return _aggregate(x, groups, parameters[:regions], parameters[regions:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        groups, weights, bias = (rest[i : i + ctx.regions] for i in range(0, 3 * ctx.regions, ctx.regions))
        dx, dweights, dbias = _aggregate_backward(grad.contiguous(), x, groups, weights, bias, ctx.needs_input_grad[0])
        return (dx, None, None, *dweights, *dbias)


def _tiles(r: int, C: int) -> dict[str, int]:
    return {"BLOCK_R": min(32, triton.next_power_of_2(r)), "BLOCK_C": min(64, triton.next_power_of_2(C))}


@_on_its_device
def _aggregate(x: Tensor, groups: Sequence[Tensor], weights: Sequence[Tensor], bias: Sequence[Tensor]) -> Tensor:
    (B, _, C), ends = x.shape, [0]
    for index in groups:
        ends.append(ends[-1] + index.shape[1])
    dtype = torch.promote_types(torch.promote_types(x.dtype, weights[0].dtype), bias[0].dtype)
    out = x.new_empty(B, ends[-1], C, dtype=dtype)
    for index, weight, b, start in zip(groups, weights, bias, ends, strict=False):
        _, G, r = index.shape
        tiles = _tiles(r, C)
        kernels.aggregate[(B * G, triton.cdiv(C, tiles["BLOCK_C"]))](
            *(x, index, weight.contiguous(), b, out[:, start:]),
            *(x.stride(0), x.stride(1), index.stride(0), out.stride(0), G, r, C),
            **tiles,
        )
    return out


@_on_its_device
def _aggregate_backward(
    grad: Tensor,
    x: Tensor,
    groups: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Sequence[Tensor],
    of_tokens: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    (B, N, C), start = x.shape, 0
    dx = x.new_zeros(B, N, C, dtype=torch.float32) if of_tokens else None
    atomic = of_tokens and not torch.are_deterministic_algorithms_enabled()
    dweights, dbias = [], []
    for index, weight, b in zip(groups, weights, bias, strict=True):
        _, G, r = index.shape
        here = grad[:, start : start + G]
        start += G
        products = x.new_empty(B * G, r, dtype=torch.float32)
        kernels.aggregate_backward[(B * G,)](
            *(x, index, weight.contiguous(), here, products if dx is None else dx, products),
            *(x.stride(0), x.stride(1), index.stride(0), grad.stride(0), N * C, G, r, C),
            **_tiles(r, C), TOKENS=atomic,
        )  # fmt: skip
        if dx is not None and not atomic:
            shares = weight.view(-1, 1).float() * here[:, :, None].float()  # (B, G, r, C)
            rows = index.flatten(1) + N * torch.arange(B, device=x.device)[:, None]
            dx.view(B * N, C).index_add_(0, rows.flatten(), shares.view(-1, C))
        dweights.append(products.sum(0).view(weight.shape).to(weight.dtype))
        dbias.append(here.sum(dtype=torch.float32).view(b.shape).to(b.dtype))
    return None if dx is None else dx.to(x.dtype), dweights, dbias


# -- merging ------------------------------------------------------------------------------------------------------


@_on_its_device
def most_similar(x: Tensor, seeds: Tensor) -> Tensor:
    """See :func:`sgformer.ops.merging.most_similar`."""
    x, seeds = x.contiguous(), seeds.contiguous()
    (B, L, C), G = x.shape, seeds.shape[1]
    choice = x.new_empty(B, L, dtype=torch.int64)
    kernels.most_similar[(B, triton.cdiv(L, 64))](
        *(x, seeds, choice, x.stride(0), seeds.stride(0), L, G, C),
        BLOCK_L=64, BLOCK_G=32, BLOCK_C=32, PRECISION=_precision(),
    )  # fmt: skip
    return choice
