"""The same operations, slow and obvious; tests compare the fast ones with them, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """One window at a time, by slicing. See ``windows.partition``."""
    _, H, W, C = x.shape
    h, w = window
    out = []
    for image in x:
        for top in range(0, H, h):
            for left in range(0, W, w):
                tile = x.new_zeros(h, w, C)
                piece = image[top : top + h, left : left + w]
                tile[: piece.shape[0], : piece.shape[1]] = piece
                out.append(tile.reshape(h * w, C))
    return torch.stack(out)


def merge(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """One token at a time, by index in its window. See ``windows.merge``."""
    (H, W), (h, w) = grid, window
    cols = math.ceil(W / w)
    per_image = math.ceil(H / h) * cols
    images = []
    for start in range(0, x.shape[0], per_image):
        tokens = [x[start + (i // h) * cols + j // w, (i % h) * w + j % w] for i in range(H) for j in range(W)]
        images.append(torch.stack(tokens).reshape(H, W, x.shape[-1]))
    return torch.stack(images)


def attention_and_received(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, valid_queries: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The whole matrix at once, one image and head at a time. See ``attention.attention_and_received``."""
    out, received = torch.empty_like(q), []
    for b in range(q.shape[0]):
        columns = []
        for h in range(q.shape[1]):
            scores = q[b, h] @ k[b, h].T / math.sqrt(q.shape[-1])
            if valid is not None:
                scores = scores.masked_fill(~valid[b], -torch.inf)
            weights = scores.softmax(-1)
            out[b, h] = weights @ v[b, h]
            real = slice(None) if valid_queries is None else valid_queries[b]
            columns.append(weights[real].sum(0))
        received.append(torch.stack(columns).mean(0))
    return out, torch.stack(received).detach()


def aggregate(
    x: Tensor,
    significance: Tensor,
    shares: Sequence[float],
    rates: Sequence[int],
    weights: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> Tensor:
    """From significance to key/value tokens, one token at a time. See the functions of ``regroup``."""
    images = []
    for tokens, score in zip(x, significance, strict=True):
        N = len(score)
        order = sorted(range(N), key=lambda i, s=score: float(s[i]))  # Python's sort is stable
        out, start = [], 0
        for i, r in enumerate(rates):
            left = len(shares) - i - 1
            so_far = Fraction(sum(shares[: i + 1])).limit_denominator(1 << 20)
            end = N if left == 0 else min(max(math.floor(so_far * N + Fraction(1, 2)), start + 1), N - left)
            region = order[start:end]
            L = len(region)
            G = math.ceil(L / r)
            for g in range(G):
                picks = [math.floor((p + 0.5) * L / (G * r)) for p in range(g * r, (g + 1) * r)]
                out.append(sum(weights[i].flatten()[k] * tokens[region[p]] for k, p in enumerate(picks)) + bias[i])
            start = end
        images.append(torch.stack(out))
    return torch.stack(images)


def resample_weights(weight: Tensor, members: int) -> Tensor:
    """Twin of :func:`sgformer.ops.resample_weights`: a member's weight is a sum over the old parts it overlaps."""
    r = weight.shape[-1]
    out = []
    for j in range(members):
        total = torch.zeros_like(weight[..., 0])
        for k in range(r):
            start, end = max(Fraction(j, members), Fraction(k, r)), min(Fraction(j + 1, members), Fraction(k + 1, r))
            if end > start:
                total = total + weight[..., k] * float((end - start) * r)
        out.append(total)
    return torch.stack(out, -1)


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map, (..., in) to (..., out), of numbers rounded to bfloat16; products and sums are exact."""
    x, weight = x.bfloat16().double(), weight.bfloat16().double()
    return (x @ weight.t() + bias).to(torch.float32)


def quantize_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (out, in) as integers from -127 to 127, and the scale (out,) of each of its rows, an output channel."""
    largest = weight.abs().amax(1)
    scale = torch.where(largest == 0, 1.0, largest) / 127  # NaN stays
    return (weight / scale[:, None]).round().to(torch.int8), scale


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (..., C) as integers from 0 to 255, and the scale and zero (..., 1) of each: x = scale * (q - zero).

    What lies between its least and its largest number, and 0, is cut into 255 equal steps.
    """
    least, largest = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (largest - least) / 255
    inverse = torch.where(scale > 1e-30, 1 / scale, 0.0)
    zero = (-least * inverse).round()
    return ((x * inverse).round() + zero).clamp(0, 255), scale, zero


def linear_int8(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map, (..., in) to (..., out), of integers: those of :func:`quantize_tokens` and `quantize_columns`."""
    (numbers, scale, zero), (columns, scales) = quantize_tokens(x), quantize_columns(weight)
    sums = (numbers - zero).double() @ columns.t().double()
    return (sums * scale * scales + bias).to(torch.float32)
