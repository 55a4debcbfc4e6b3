"""The kernels. What they compute is in ``functions``, which launches them.

Legend: B batch (of images or of windows), h heads, N queries, M keys, d channels of a head, D = d rounded up to a power
of two; G groups of r tokens, C channels. Scores are in base 2: q k^T / sqrt(d) * log2(e), which `scale` says. Sums and
softmax are float32; products take `PRECISION` where operands are float32.

No kernel holds more of the N x M matrix than one block of it, nor writes more than its row and column sums.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import triton
import triton.language as tl

SIZES = ("heads", "N", "M", "span", "G", "L", "r", "i_b")

#: In place of minus infinity for keys that do not count, so that a block without any has no infinity minus infinity.
NEVER = tl.constexpr(-1.0e30)


def _jit(kernel: Any) -> Any:
    """Compiled once for all sizes, not again for those that are 1 or multiples of 16; strides are multiples anyway."""
    return triton.jit(kernel, do_not_specialize=[n for n in SIZES if n in signature(kernel).parameters])


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # Triton's interpreter multiplies bfloat16 as the integers that hold it
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rows(pointer, rows, stride, count, d: tl.constexpr, D: tl.constexpr):
    """(rows, D) of a matrix of `count` rows with d channels side by side; zeros elsewhere."""
    channels = tl.arange(0, D)
    there = (rows[:, None] < count) & (channels[None, :] < d)
    return tl.load(pointer + rows[:, None] * stride + channels[None, :], mask=there, other=0.0)


@triton.jit
def _put_rows(pointer, values, rows, stride, count, d: tl.constexpr, D: tl.constexpr):
    channels = tl.arange(0, D)
    there = (rows[:, None] < count) & (channels[None, :] < d)
    tl.store(pointer + rows[:, None] * stride + channels[None, :], values.to(pointer.dtype.element_ty), mask=there)


@triton.jit
def _scores(q, k, keys, valid, M, scale, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """(queries, keys) in base 2; `NEVER` where a key is padding, or beyond the last."""
    there = keys < M
    if PADDED:
        there = there & (tl.load(valid + keys, mask=there, other=0) != 0)
    scores = _dot(q, tl.trans(k), PRECISION) * scale
    return tl.where(there[None, :], scores, NEVER)


@triton.jit
def _counted(rows, real, N, PARTIAL_QUERIES: tl.constexpr):
    """Which queries enter the column sums."""
    there = rows < N
    if PARTIAL_QUERIES:
        there = there & (tl.load(real + rows, mask=there, other=0) != 0)
    return there


@_jit
def attend(
    Q, K, V, VALID, REAL, OUT, LSE, SUMS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, heads, N, M, scale,
    d: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr,
    PARTIAL_QUERIES: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of BLOCK_N queries. If all keys are in one block (WHOLE), also its column sums.

    Grid (B * h, blocks of queries). LSE (B * h, N); SUMS (B * h, blocks of queries, M) if WHOLE.
    """
    image_head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, head = image_head // heads, image_head % heads
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _rows(Q + image * q_b + head * q_h, rows, q_n, N, d, D)
    highest = tl.full((BLOCK_N,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    out = tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(0, M, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        k = _rows(K + image * k_b + head * k_h, keys, k_n, M, d, D)
        v = _rows(V + image * v_b + head * v_h, keys, v_n, M, d, D)
        scores = _scores(q, k, keys, VALID + image * M, M, scale, PADDED, PRECISION)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(weights, 1)
        out = out * kept[:, None] + _dot(weights.to(v.dtype), v, PRECISION)
        highest = higher
        if WHOLE:
            counted = _counted(rows, REAL + image * N, N, PARTIAL_QUERIES)
            sums = tl.sum(tl.where(counted[:, None], weights / total[:, None], 0.0), 0)
            place = SUMS + (image_head * tl.num_programs(1) + block) * M
            tl.store(place + keys, sums, mask=keys < M)
    _put_rows(OUT + image * o_b + head * o_h, out / total[:, None], rows, o_n, N, d, D)
    tl.store(LSE + image_head * N + rows, highest + tl.log2(total), mask=rows < N)


@_jit
def receive(
    Q, K, VALID, REAL, LSE, SUMS,
    q_b, q_h, q_n, k_b, k_h, k_n, heads, N, M, span, scale,
    d: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr,
    PARTIAL_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The second pass: column sums of BLOCK_M keys over `span` queries, from the log-sum-exp of the first.

    Grid (B * h, blocks of keys, parts of the queries); SUMS (B * h, parts, M).
    """
    image_head, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    image, head = image_head // heads, image_head % heads
    keys = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = _rows(K + image * k_b + head * k_h, keys, k_n, M, d, D)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        q = _rows(Q + image * q_b + head * q_h, rows, q_n, N, d, D)
        scores = _scores(q, k, keys, VALID + image * M, M, scale, PADDED, PRECISION)
        lse = tl.load(LSE + image_head * N + rows, mask=rows < N, other=0.0)
        counted = _counted(rows, REAL + image * N, N, PARTIAL_QUERIES)
        sums += tl.sum(tl.where(counted[:, None], tl.exp2(scores - lse[:, None]), 0.0), 0)
    tl.store(SUMS + (image_head * tl.num_programs(2) + part) * M + keys, sums, mask=keys < M)


@_jit
def attend_backward_queries(
    Q, K, V, VALID, OUT, GRAD, LSE, DELTA, DQ,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, g_b, g_h, g_n, heads, N, M, scale, factor,
    d: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_N queries, DQ (B, h, N, d), and DELTA (B * h, N): sums over channels of GRAD * OUT."""
    image_head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, head = image_head // heads, image_head % heads
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _rows(Q + image * q_b + head * q_h, rows, q_n, N, d, D)
    grad = _rows(GRAD + image * g_b + head * g_h, rows, g_n, N, d, D)
    out = _rows(OUT + image * o_b + head * o_h, rows, o_n, N, d, D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + image_head * N + rows, delta, mask=rows < N)
    lse = tl.load(LSE + image_head * N + rows, mask=rows < N, other=0.0)
    dq = tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(0, M, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        k = _rows(K + image * k_b + head * k_h, keys, k_n, M, d, D)
        v = _rows(V + image * v_b + head * v_h, keys, v_n, M, d, D)
        scores = _scores(q, k, keys, VALID + image * M, M, scale, PADDED, PRECISION)
        weights = tl.exp2(scores - lse[:, None])
        change = weights * (_dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        dq += _dot(change.to(k.dtype), k, PRECISION)
    _put_rows(DQ + image_head * N * d, dq * factor, rows, d, N, d, D)


@_jit
def attend_backward_keys(
    Q, K, V, VALID, GRAD, LSE, DELTA, DK, DV,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, heads, N, M, span, scale, factor,
    d: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_M keys and values from `span` queries: DK and DV (B * h, parts of the queries, M, d)."""
    image_head, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    image, head = image_head // heads, image_head % heads
    keys = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = _rows(K + image * k_b + head * k_h, keys, k_n, M, d, D)
    v = _rows(V + image * v_b + head * v_h, keys, v_n, M, d, D)
    dk = tl.zeros((BLOCK_M, D), tl.float32)
    dv = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        q = _rows(Q + image * q_b + head * q_h, rows, q_n, N, d, D)
        grad = _rows(GRAD + image * g_b + head * g_h, rows, g_n, N, d, D)
        lse = tl.load(LSE + image_head * N + rows, mask=rows < N, other=0.0)
        delta = tl.load(DELTA + image_head * N + rows, mask=rows < N, other=0.0)
        scores = _scores(q, k, keys, VALID + image * M, M, scale, PADDED, PRECISION)
        weights = tl.exp2(scores - lse[:, None])  # of queries beyond the last, too: their gradient is 0
        dv += _dot(tl.trans(weights.to(grad.dtype)), grad, PRECISION)
        change = weights * (_dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        dk += _dot(tl.trans(change.to(q.dtype)), q, PRECISION)
    place = (image_head * tl.num_programs(2) + part) * M * d
    _put_rows(DK + place, dk * factor, keys, d, M, d, D)
    _put_rows(DV + place, dv, keys, d, M, d, D)


@_jit
def aggregate(
    X, INDEX, WEIGHT, BIAS, OUT, x_b, x_n, i_b, o_b, G, r, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One region: sums over k of WEIGHT[k] X[INDEX[k]], plus BIAS. Grid (B * G, blocks of channels)."""
    image, group = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, r, BLOCK_R):
        members = start + tl.arange(0, BLOCK_R)
        there = members < r
        index = tl.load(INDEX + image * i_b + group * r + members, mask=there, other=0)
        weight = tl.load(WEIGHT + members, mask=there, other=0.0).to(tl.float32)
        both = there[:, None] & (channels[None, :] < C)
        x = tl.load(X + image * x_b + index[:, None] * x_n + channels[None, :], mask=both, other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * x, 0)
    total += tl.load(BIAS).to(tl.float32)
    tl.store(OUT + image * o_b + group * C + channels, total.to(OUT.dtype.element_ty), mask=channels < C)


@_jit
def aggregate_backward(
    X, INDEX, WEIGHT, GRAD, DX, DWEIGHT, x_b, x_n, i_b, g_b, d_b, G, r, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One region: WEIGHT[k] GRAD added to DX[INDEX[k]] (B, N, C) if TOKENS; DWEIGHT (B * G, r), products with GRAD.

    Grid (B * G,). Additions are atomic: a token may be in a group, or in two, more than once.
    """
    image, group = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    for start in range(0, r, BLOCK_R):
        members = start + tl.arange(0, BLOCK_R)
        there = members < r
        index = tl.load(INDEX + image * i_b + group * r + members, mask=there, other=0)
        weight = tl.load(WEIGHT + members, mask=there, other=0.0).to(tl.float32)
        products = tl.zeros((BLOCK_R,), tl.float32)
        for first in range(0, C, BLOCK_C):
            channels = first + tl.arange(0, BLOCK_C)
            both = there[:, None] & (channels[None, :] < C)
            grad = tl.load(GRAD + image * g_b + group * C + channels, mask=channels < C, other=0.0).to(tl.float32)
            x = tl.load(X + image * x_b + index[:, None] * x_n + channels[None, :], mask=both, other=0.0)
            products += tl.sum(x.to(tl.float32) * grad[None, :], 1)
            if TOKENS:
                place = DX + image * d_b + index[:, None] * C + channels[None, :]
                tl.atomic_add(place, weight[:, None] * grad[None, :], mask=both)
        tl.store(DWEIGHT + tl.program_id(0).to(tl.int64) * r + members, products, mask=there)


@_jit
def most_similar(
    X, SEEDS, CHOICE, x_b, s_b, L, G, C,
    BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The seed with the highest product, the first of equal ones: CHOICE (B, L). Grid (B, blocks of tokens)."""
    image = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    highest = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    choice = tl.zeros((BLOCK_L,), tl.int32)
    for start in range(0, G, BLOCK_G):
        seeds = start + tl.arange(0, BLOCK_G)
        products = tl.zeros((BLOCK_L, BLOCK_G), tl.float32)
        for first in range(0, C, BLOCK_C):
            channels = first + tl.arange(0, BLOCK_C)
            here = (rows[:, None] < L) & (channels[None, :] < C)
            x = tl.load(X + image * x_b + rows[:, None] * C + channels[None, :], mask=here, other=0.0)
            here = (seeds[:, None] < G) & (channels[None, :] < C)
            s = tl.load(SEEDS + image * s_b + seeds[:, None] * C + channels[None, :], mask=here, other=0.0)
            products += _dot(x, tl.trans(s), PRECISION)
        products = tl.where(seeds[None, :] < G, products, float("-inf"))
        here = tl.max(products, 1)
        choice = tl.where(here > highest, start + tl.argmax(products, 1), choice)
        highest = tl.maximum(highest, here)
    tl.store(CHOICE + image * L + rows, choice.to(tl.int64), mask=rows < L)
