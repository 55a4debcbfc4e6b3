"""The kernels as functions of tensors.

Legend: B batch, H x W token grid, N = H * W, C channels, h heads, d = C / h. All tensors are float32 and on the CPU,
contiguous unless noted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from struct import pack as pack_bytes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgformer.backends.native.build import UnavailableError, library
from sgformer.backends.native.interface import STRUCTS
from sgformer.ops.reference import quantize_columns

CHUNK = 1 << 21  # floats: if tensors exceed these 8 MiB, callers take fewer images at a time

Affine, AffineGrad, ConstView, View = (STRUCTS[name] for name in ("Affine", "AffineGrad", "ConstView", "View"))
Grid, Conv, Attention, Groups = (STRUCTS[name] for name in ("Grid", "Conv", "Attention", "Groups"))
Block, HybridOptions, Region, ConvNorm = (STRUCTS[n] for n in ("Block", "HybridOptions", "Region", "ConvNorm"))


def lanes() -> int:
    """Floats in a vector of this processor."""
    return library().sgformer_lanes()


# -- linear maps ------------------------------------------------------------------------------------------------


def panels(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a linear map in the layout of :func:`linear`."""
    return pack(weight.detach()), padded(bias, weight.shape[0])


def pack(weight: Tensor, transposed: bool = False) -> Tensor:
    """Weight (out, in) of a linear map in the layout of :func:`linear`; ``transposed``: of the map from out to in."""
    width, n = _checked(weight := weight.contiguous()).shape
    cols, depth = (n, width) if transposed else (width, n)
    packed = weight.new_empty(depth * (cols + -cols % lanes()))
    library().sgformer_pack(weight.data_ptr(), width, n, transposed, packed.data_ptr())
    return packed


def padded(bias: Tensor | None, width: int) -> Tensor:
    """Bias (width,) of a linear map, or zeros, in the layout of :func:`linear`."""
    bias = torch.zeros(width, dtype=torch.float32, device="cpu") if bias is None else bias.detach()
    more = -width % lanes()
    return F.pad(bias, (0, more)) if more else bias


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, width: int, out: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """Linear map of (B, H, W, n) to (B, H, W, width). ``weight`` and ``bias`` come from :func:`panels`.

    ``out``: memory for the result; ``add``: a tensor of its shape to add.
    """
    return narrow_linear(x, weight, bias, width, 0, add, out)


def linear_gradient(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add: bool = False) -> None:
    """Gradients of a linear map into ``weight`` (out, in) and ``bias`` (out,), from that of its result (..., out) and
    from its input (..., in); with ``add``, they are accumulated."""
    width, n = _checked(weight).shape
    library().sgformer_linear_gradient(
        ConstView(_checked(gradient).data_ptr(), width),
        ConstView(_checked(x).data_ptr(), n),
        AffineGrad(weight.data_ptr(), None if bias is None else bias.data_ptr()),
        x.numel() // n,
        n,
        width,
        add,
    )


# -- convolutions -----------------------------------------------------------------------------------------------


def conv_panels(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight (width, C, k, k) and bias of a convolution in the layout of :func:`conv`."""
    return panels(conv_matrix(weight), bias)


def conv_matrix(weight: Tensor) -> Tensor:
    """Weight (width, C, k, k) of a convolution as that of a linear map of patches, (width, k * k * C)."""
    return weight.detach().permute(0, 2, 3, 1).flatten(1)


def conv(x: Tensor, weight: Tensor, bias: Tensor, width: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Convolution of (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), width), zero-padded.

    ``weight`` and ``bias`` come from :func:`conv_panels`.
    """
    B, H, W, C = _checked(x).shape
    rows, cols = -(-H // stride), -(-W // stride)
    out = x.new_empty(B, rows, cols, width)
    shape = Conv(B, H, W, C, kernel, stride, padding, rows, cols, width)
    library().sgformer_conv(shape, x.data_ptr(), Affine(weight.data_ptr(), bias.data_ptr()), out.data_ptr())
    return out


def conv_gradient(gradient: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Gradient of the weight (width, C, k, k) of :func:`conv`, from that of its result and from its input.

    C must be a multiple of :func:`lanes`.
    """
    (B, H, W, C), (_, rows, cols, width) = _checked(x).shape, _checked(gradient).shape
    taps = x.new_empty(kernel, kernel, width, C)
    shape = Conv(B, H, W, C, kernel, stride, padding, rows, cols, width)
    library().sgformer_conv_gradient(shape, x.data_ptr(), gradient.data_ptr(), taps.data_ptr())
    return taps.permute(2, 3, 0, 1).contiguous()


#: The weight transform of Winograd's F(2 x 2, 3 x 3).
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def winograd_panels(weight: Tensor) -> Tensor:
    """Weight (width, C, 3, 3) of a convolution in the layout of :func:`winograd`: 16 matrices of :func:`pack`."""
    g = torch.tensor(_G, dtype=torch.float64, device="cpu")
    matrices = torch.einsum("ri,oxij,cj->rcox", g, weight.detach().double(), g).flatten(0, 1)
    return torch.stack([pack(matrix.float()) for matrix in matrices])


def winograd(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """3 x 3 convolution of (B, H, W, C) to (B, H, W, width), zero-padded.

    C and width must be multiples of :func:`lanes`; ``weight`` comes from :func:`winograd_panels`.
    """
    B, H, W, C = _checked(x).shape
    out = x.new_empty(B, H, W, width)
    library().sgformer_winograd(Grid(B, H, W, C), x.data_ptr(), weight.data_ptr(), out.data_ptr(), width)
    return out


def winograd_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight (width, C, 3, 3) of :func:`winograd`, from that of its result and from its input."""
    (B, H, W, C), width = _checked(x).shape, _checked(gradient).shape[-1]
    matrices = x.new_empty(4, 4, width, C)
    library().sgformer_winograd_gradient(
        Grid(B, H, W, C), x.data_ptr(), gradient.data_ptr(), matrices.data_ptr(), width
    )
    g = torch.tensor(_G, dtype=torch.float32, device="cpu")
    return torch.einsum("ri,rcox,cj->oxij", g, matrices, g)


# -- linear maps of 16 and 8 bits -------------------------------------------------------------------------------

#: Names of precisions, and what a processor must have for them.
PRECISIONS = {"fp32": "", "bf16": "AVX512-BF16", "int8": "AVX512-VNNI"}

#: Kinds of linear maps, as interface.h lists them: bfloat16 in pairs, or by float32's instructions; tiles are AMX's.
FLOAT32, BF16_PAIRS, BF16_SINGLE, INT8, BF16_TILES, INT8_TILES = range(6)
#: What is rounded to 8 bits.
EIGHT_BITS = (INT8, INT8_TILES)


def kind(precision: str) -> int:
    """The kernels' number for a precision, as interface.h lists them.

    Raises:
        UnavailableError: this processor cannot, or there are no kernels.
    """
    pairs = BF16_PAIRS if library().sgformer_pairs_are_quick() else BF16_SINGLE
    quickest_first = {"fp32": (FLOAT32,), "bf16": (BF16_TILES, pairs), "int8": (INT8_TILES, INT8)}[precision]
    for number in quickest_first:
        if library().sgformer_has(number):
            return number
    raise UnavailableError(f"this processor, or its compiler, has no {PRECISIONS[precision]}")


def narrow_panels(weight: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a linear map, as :func:`narrow_linear` reads them."""
    if not kind:
        return panels(weight, bias)
    width = len(weight := weight.detach())
    group = 4 if kind in EIGHT_BITS else 2
    heads: list[Tensor] = []
    if kind in EIGHT_BITS:
        weight, scales = quantize_columns(weight)
        sums = weight.sum(1, dtype=torch.float32)
        heads = [padded(each, width).view(torch.uint8) for each in (scales, sums)]
    else:
        weight = weight.bfloat16()
    weight = F.pad(weight, (0, -weight.shape[1] % group, 0, -width % lanes()))
    cut = [part.unflatten(1, (-1, group)).transpose(0, 1).flatten() for part in weight.split(4 * lanes())]
    packed = torch.cat([*heads, torch.cat(cut).view(torch.uint8)])
    return packed, padded(bias, width)


def narrow_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    width: int,
    kind: int,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`linear` with rounded operands, but for kind 0: x (B, H, W, n) float32 to (B, H, W, width) float32.

    ``weight`` and ``bias`` come from :func:`narrow_panels`.
    """
    B, H, W, n = _checked(x).shape
    out = x.new_empty(B, H, W, width) if out is None else _checked(out)
    library().sgformer_narrow_linear(
        kind,
        ConstView(x.data_ptr(), n),
        Affine(weight.data_ptr(), bias.data_ptr()),
        ConstView(None if add is None else _checked(add).data_ptr(), width),
        View(out.data_ptr(), width),
        B * H * W,
        n,
        width,
    )
    return out


def narrow_norm_linear(
    x: Tensor, norm: tuple[Tensor, Tensor], eps: float, weight: Tensor, bias: Tensor, width: int, kind: int
) -> Tensor:
    """:func:`narrow_linear` of the LayerNorm of x, whose weight and bias are ``norm``."""
    B, H, W, n = _checked(x).shape
    out, memory = x.new_empty(B, H, W, width), x.new_empty(0 if kind else x.numel())
    library().sgformer_narrow_norm_linear(
        kind,
        x.data_ptr(),
        Affine(norm[0].data_ptr(), norm[1].data_ptr()),
        eps,
        Affine(weight.data_ptr(), bias.data_ptr()),
        View(out.data_ptr(), width),
        B * H * W,
        n,
        width,
        memory.data_ptr(),
    )
    return out


def narrow_conv(
    x: Tensor, weight: Tensor, bias: Tensor, width: int, kernel: int, stride: int, kind: int, padding: int = 0
) -> Tensor:
    """:func:`conv` with rounded operands; its weight is that of :func:`conv_matrix`, packed."""
    B, H, W, C = _checked(x).shape
    rows, cols = -(-H // stride), -(-W // stride)
    out = x.new_empty(B, rows, cols, width)
    shape = Conv(B, H, W, C, kernel, stride, padding, rows, cols, width)
    library().sgformer_narrow_conv(
        kind, shape, x.data_ptr(), Affine(weight.data_ptr(), bias.data_ptr()), out.data_ptr()
    )
    return out


# -- 3 x 3 depthwise convolutions -------------------------------------------------------------------------------


def tap_major(weight: Tensor) -> Tensor:
    """The kernel of a 3 x 3 depthwise convolution, (C, 1, 3, 3), in the layout of the functions here: (9, C)."""
    return weight.detach().flatten(1).t().contiguous()


def taps_plus_input(weight: Tensor) -> Tensor:
    """:func:`tap_major` of x + depthwise(x): the centre tap plus 1."""
    taps = tap_major(weight).clone()
    taps[4] += 1
    return taps


def depthwise_stride2(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of (B, H, W, C), stride 2, zero padding, to (B, ceil(H / 2), ceil(W / 2), C).

    ``weight``: (9, C), of :func:`tap_major`.
    """
    B, H, W, C = _checked(x).shape
    out = x.new_empty(B, -(-H // 2), -(-W // 2), C)
    library().sgformer_depthwise_stride2(Grid(B, H, W, C), x.data_ptr(), weight.data_ptr(), out.data_ptr())
    return out


def depthwise_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None, is_short: bool = False
) -> Tensor:
    """GELU of the depthwise convolution of (B, H, W, C); weight (9, C), bias (C,). ``out`` may be x.

    ``is_short``: a quicker GELU with an error of up to 1e-4.
    """
    B, H, W, C = _checked(x).shape
    out = x.new_empty(B, H, W, C) if out is None else _checked(out)
    taps = Affine(weight.data_ptr(), bias.data_ptr())
    library().sgformer_depthwise_gelu(Grid(B, H, W, C), x.data_ptr(), taps, out.data_ptr(), is_short)
    return out


def depthwise_add(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Add the depthwise convolution of x, (B, H, W, C), to ``out``; weight (9, C), bias (C,).

    x may be a slice of a wider tensor's channels.
    """
    B, H, W, C = _checked(out).shape
    taps = Affine(weight.data_ptr(), bias.data_ptr())
    library().sgformer_depthwise_add(Grid(B, H, W, C), _view(x, ConstView), taps, out.data_ptr())


def depthwise_backward(
    x: Tensor, gradient: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None, gelu: Tensor | None = None
) -> Tensor:
    """Gradient of a depthwise convolution's input x, into ``out``, from that of its result; all (B, H, W, C).

    With ``bias`` and ``gelu``, of :func:`depthwise_gelu`, whose result is written into ``gelu``. ``out`` may be
    ``gradient``. All but ``gelu`` may be slices of a wider tensor's channels.

    Returns:
        (10, C): gradients of the 9 taps and of the bias.
    """
    B, H, W, C = x.shape
    taps = x.new_empty(B, 10, C)
    library().sgformer_depthwise_backward(
        Grid(B, H, W, C),
        _view(x, ConstView),
        _view(gradient, ConstView),
        _view(out, View),
        None if gelu is None else _checked(gelu).data_ptr(),
        Affine(weight.data_ptr(), None if bias is None else bias.data_ptr()),
        taps.data_ptr(),
    )
    return taps.sum(0)


# -- norms ------------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    out, C = _checked(x).new_empty(x.shape), x.shape[-1]
    norm = Affine(weight.data_ptr(), bias.data_ptr())
    library().sgformer_layer_norm(x.data_ptr(), out.data_ptr(), x.numel() // C, C, norm, eps, False)
    return out


def layer_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, written over ``gradient``, the weight and the bias of :func:`layer_norm`.

    ``add`` is added to the first.
    """
    C, g_weight, g_bias = _checked(x).shape[-1], torch.empty_like(weight), torch.empty_like(bias)
    library().sgformer_layer_norm_backward(
        x.data_ptr(),
        _checked(gradient).data_ptr(),
        None if add is None else _checked(add).data_ptr(),
        gradient.data_ptr(),
        x.numel() // C,
        C,
        weight.data_ptr(),
        eps,
        AffineGrad(g_weight.data_ptr(), g_bias.data_ptr()),
    )
    return gradient, g_weight, g_bias


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool, inplace: bool = False) -> Tensor:
    """GroupNorm with one group of (B, H, W, C), then optionally a GELU."""
    B, H, W, C = _checked(x).shape
    out = x if inplace else x.new_empty(B, H, W, C)
    norm = Affine(weight.data_ptr(), bias.data_ptr())
    library().sgformer_group_norm(Grid(B, H, W, C), x.data_ptr(), out.data_ptr(), norm, eps, gelu)
    return out


def group_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias of :func:`group_norm`."""
    B, H, W, C = _checked(x).shape
    out, g_weight, g_bias = x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)
    library().sgformer_group_norm_backward(
        Grid(B, H, W, C),
        x.data_ptr(),
        _checked(gradient).data_ptr(),
        out.data_ptr(),
        Affine(weight.data_ptr(), bias.data_ptr()),
        eps,
        gelu,
        AffineGrad(g_weight.data_ptr(), g_bias.data_ptr()),
    )
    return out, g_weight, g_bias


# -- attention --------------------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    kv: Tensor,
    heads: int,
    q_window: tuple[int, int],
    kv_window: tuple[int, int],
    out: Tensor,
    reduction: int = 0,
) -> Tensor | None:
    """Attention of queries (B, H, W, D) to keys and values (B, H', W', 2 D), window by window, into ``out``.

    All may be slices of wider tensors' channels. With ``reduction``, the factor by which the grid of keys is coarser,
    also returns the significance of every token (B, H, W): the attention that its key received, averaged over heads and
    the queries of a whole window.
    """
    received = q.new_empty(q.shape[:3]) if reduction else None
    library().sgformer_attend(
        _attention(q, kv, heads, q_window, kv_window),
        _view(q, ConstView),
        _view(kv, ConstView),
        _view(out, View),
        None if received is None else received.data_ptr(),
        reduction,
    )
    return received


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
    library().sgformer_attend_backward(
        _attention(q, kv, heads, q_window, kv_window),
        _view(q, ConstView),
        _view(kv, ConstView),
        _view(gradient, ConstView),
        _view(q_out, View),
        _view(kv_out, View),
    )


def _attention(q: Tensor, kv: Tensor, heads: int, q_window: tuple[int, int], kv_window: tuple[int, int]) -> Any:
    B, H, W, D = q.shape
    return Attention(B, H, W, *kv.shape[1:3], *q_window, *kv_window, heads, D // heads)


# -- groups of tokens -------------------------------------------------------------------------------------------


def argsort(values: Tensor) -> Tensor:
    """Stable argsort of (B, N), ascending, NaN last: (B, N) int64, like :func:`sgformer.ops.sort_tokens`."""
    B, N = _checked(values).shape
    indices = torch.empty(B, N, dtype=torch.int64, device="cpu")
    library().sgformer_argsort(values.data_ptr(), B, N, indices.data_ptr())
    return indices


def aggregate(x: Tensor, groups: Sequence[Tensor], weights: Sequence[Tensor], bias: Sequence[Tensor]) -> Tensor:
    """:func:`sgformer.ops.aggregate`: x (B, N, C) and groups (B, M_i, rate_i) int64 to (B, M, C)."""
    B, N, C = _checked(x).shape
    out = x.new_empty(B, sum(group.shape[1] for group in groups), C)
    for region, w, b in zip(_groups(groups), weights, bias, strict=True):
        affine = Affine(w.data_ptr(), b.data_ptr())
        library().sgformer_aggregate(region, x.data_ptr(), B, N, C, affine, out.data_ptr())
    return out


def aggregate_backward(
    gradient: Tensor, x: Tensor, groups: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the weights and of the biases of :func:`aggregate`; that of x is added to ``out``."""
    B, N, C = _checked(x).shape
    g_weights, g_bias = [torch.empty_like(w) for w in weights], [w.new_empty(1) for w in weights]
    for region, w, g_w, g_b in zip(_groups(groups), weights, g_weights, g_bias, strict=True):
        library().sgformer_aggregate_backward(
            region,
            x.data_ptr(),
            _checked(gradient).data_ptr(),
            B,
            N,
            C,
            w.data_ptr(),
            _checked(out).data_ptr(),
            AffineGrad(g_w.data_ptr(), g_b.data_ptr()),
        )
    return g_weights, g_bias


def _groups(groups: Sequence[Tensor]) -> list[Any]:
    total, first, found = sum(group.shape[1] for group in groups), 0, []
    for group in groups:
        _, count, rate = group.shape
        if group.stride()[1:] != (rate, 1):
            raise ValueError(f"the members of a group must be contiguous (got strides {group.stride()})")
        found.append(Groups(group.data_ptr(), group.stride(0), count, rate, total, first))
        first += count
    return found


# -- whole blocks -----------------------------------------------------------------------------------------------


class Weights:
    """Parameters of a block, for the kernels.

    Args:
        struct: ``TailWeights`` or another of interface.h that holds only weights and biases.
        parts: weight and bias by the struct's names, linear maps of :func:`narrow_panels` for the block's kind, 3 x 3
            kernels of :func:`tap_major`.
    """

    def __init__(self, struct: str, **parts: tuple[Tensor, Tensor]):
        names = [name for name, _ in STRUCTS[struct]._fields_]
        if sorted(parts) != sorted(names):
            raise ValueError(f"{struct} has {', '.join(names)} (got {', '.join(parts)})")
        self.struct = struct
        self.tensors = [tensor for name in names for tensor in parts[name]]
        self._addresses: Any = None

    def addresses(self) -> Any:
        """The struct, made once. All fields at once, in their order: one by one takes three times as long."""
        if (made := self._addresses) is None:
            self._addresses = made = STRUCTS[self.struct].from_buffer_copy(_pointers(self.tensors))
        return made

    def __getstate__(self) -> dict[str, Any]:
        """A copy has its parameters elsewhere, and so has what goes to another process: torch shares their memory."""
        self._addresses = None
        return self.__dict__


class ConvNorms:
    """Convolutions, each with a GroupNorm of one group and, on demand, a GELU, one after the other, in one call.

    It keeps addresses, so it is not to be copied.

    Args:
        layers: the fields of interface.h's ``ConvNorm`` but ``map`` and ``norm``, in order.
        tensors: of each layer the convolution's weight and bias, packed for how it is computed, and the norm's.
    """

    def __init__(self, layers: Sequence[Sequence[Any]], tensors: Sequence[Sequence[Tensor | None]]):
        self.tensors = tensors  # whose addresses these are
        self.layers = (ConvNorm * len(layers))()
        for i, (layer, four) in enumerate(zip(layers, tensors, strict=True)):
            weight, bias, gain, shift = (None if t is None else t.data_ptr() for t in four)
            self.layers[i] = ConvNorm(*layer, Affine(weight, bias), Affine(gain, shift))

    def __call__(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C')."""
        B, H, W, C = _checked(x).shape
        grid, widest = Grid(B, H, W, C), 0
        for layer in self.layers:
            H, W, C = -(-H // layer.stride), -(-W // layer.stride), layer.width
            widest = max(widest, B * H * W * C)
        out, scratch = x.new_empty(B, H, W, C), x.new_empty(2 * widest)
        library().sgformer_conv_norms(
            grid, self.layers, len(self.layers), x.data_ptr(), out.data_ptr(), scratch.data_ptr(), widest
        )
        return out


def hybrid_block(
    x: Tensor,
    parts: Weights,
    tail: Weights,
    hidden: int,
    heads: int,
    reduction: int,
    window: int,
    is_global: bool,
    eps: float,
    reduce_eps: float,
    kind: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:class:`~sgformer.models.backbone.HybridBlock`: (B, H, W, C) to the same, and two significance maps (B, H, W)."""
    B, H, W, C = _checked(x).shape
    reduced = B * -(-H // reduction) * -(-W // reduction)
    out, coarse, fine = x.new_empty(x.shape), x.new_empty(B, H, W), x.new_empty(B, H, W)
    scratch = x.new_empty(B * H * W * (2 * C + max(hidden, 3 * C)) + 2 * reduced * C)
    library().sgformer_hybrid_block(
        Block(B, H, W, C, hidden, heads, kind, eps),
        HybridOptions(reduction, window, is_global, reduce_eps),
        parts.addresses(),
        tail.addresses(),
        x.data_ptr(),
        out.data_ptr(),
        coarse.data_ptr(),
        fine.data_ptr(),
        scratch.data_ptr(),
    )
    return out, coarse, fine


def guided_block(
    x: Tensor,
    significance: Tensor,
    parts: Weights,
    tail: Weights,
    maps: Sequence[Sequence[Tensor]],
    hidden: int,
    heads: int,
    regions: Sequence[tuple[int, int]],
    eps: float,
    kind: int = 0,
) -> Tensor:
    """:class:`~sgformer.models.backbone.GuidedBlock`: (B, H, W, C) to the same, with significance (B, H, W).

    ``regions``: length and rate of each; ``maps``: weight (1, rate) and bias (1,) of each.
    """
    B, H, W, C = _checked(x).shape
    if _checked(significance).shape != (B, H, W):
        raise ValueError(f"significance must be {(B, H, W)} (got {tuple(significance.shape)})")
    pooled = sum(-(-length // rate) for length, rate in regions)
    out = x.new_empty(x.shape)
    scratch = x.new_empty(B * H * W * (2 * C + max(hidden, 2 * C)) + 3 * B * pooled * C)
    library().sgformer_guided_block(
        Block(B, H, W, C, hidden, heads, kind, eps),
        parts.addresses(),
        tail.addresses(),
        (Region * len(regions)).from_buffer_copy(pack_bytes(f"{2 * len(regions)}q", *itertools.chain(*regions))),
        (Affine * len(regions)).from_buffer_copy(_pointers(itertools.chain(*maps))),
        len(regions),
        x.data_ptr(),
        significance.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
    )
    return out


def plain_block(x: Tensor, parts: Weights, tail: Weights, hidden: int, heads: int, eps: float, kind: int = 0) -> Tensor:
    """:class:`~sgformer.models.backbone.PlainBlock`: (B, H, W, C) to the same."""
    B, H, W, C = _checked(x).shape
    out, scratch = x.new_empty(x.shape), x.new_empty(B * H * W * (2 * C + max(hidden, 4 * C)))
    library().sgformer_plain_block(
        Block(B, H, W, C, hidden, heads, kind, eps),
        parts.addresses(),
        tail.addresses(),
        x.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
    )
    return out


# -- arguments of the kernels -----------------------------------------------------------------------------------


def _pointers(tensors: Iterable[Tensor]) -> bytes:
    addresses = [tensor.data_ptr() for tensor in tensors]
    return pack_bytes(f"{len(addresses)}P", *addresses)


def _checked(x: Tensor) -> Tensor:
    """Check that a tensor is contiguous float32 on the CPU, as the kernels read it."""
    if x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous():
        raise ValueError(
            f"native kernels take contiguous float32 on the CPU (got {x.dtype} on {x.device}, shape {tuple(x.shape)}, "
            f"strides {x.stride()})"
        )
    return x


def _view(x: Tensor, kind: Any) -> Any:
    """(B, H, W, C), possibly a slice of a wider tensor's channels, as a view for the kernels."""
    _, H, W, _ = x.shape
    stride = x.stride(2)
    if x.dtype != torch.float32 or not x.is_cpu or x.stride() != (H * W * stride, W * stride, stride, 1):
        raise ValueError(
            f"native kernels take float32 on the CPU, channels of a contiguous (B, H, W, C) (got {x.dtype} on "
            f"{x.device}, shape {tuple(x.shape)}, strides {x.stride()})"
        )
    return kind(x.data_ptr(), stride)
