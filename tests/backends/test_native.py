"""The compiled kernels against torch's own operations in float64, for every kind of vector that this machine has."""

import copy
import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sgformer
from sgformer import ops
from sgformer.backends import native
from sgformer.backends.native.interface import FUNCTIONS, STRUCTS, parse
from sgformer.models.backbone import GuidedBlock, HybridBlock, attend_scale

try:
    native.library()
except native.UnavailableError as error:
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)

KINDS = {"native": native.build.PROCESSOR}
if platform.machine() in ("x86_64", "AMD64"):
    KINDS["no AVX"] = ("-march=x86-64",)
    if "avx2" in Path("/proc/cpuinfo").read_text():
        KINDS["AVX2"] = ("-march=haswell",)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "native" else pytest.mark.slow) for name in KINDS],
    autouse=True,
)
def kind(request, tmp_path_factory):
    """Every test runs with kernels for each of them: other processors than this one have narrower registers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(native.build, "PROCESSOR", KINDS[request.param])
        native.library.cache_clear()
        yield request.param
    native.library.cache_clear()


@pytest.fixture
def once(kind):
    if kind != "native":
        pytest.skip("the same for every kind")


def close(got, expected, tolerance=1e-5):
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def image(x):
    return x.permute(0, 3, 1, 2).double()


def tokens(x):
    return x.permute(0, 2, 3, 1)


# -- kernels that only whole blocks call, called alone ----------------------------------------------------------------


def linear(x, weight, bias, width, add=None, out=None):
    B, H, W, n = x.shape
    out = torch.empty(B, H, W, width) if out is None else out
    added = (None, 0) if add is None else (add.data_ptr(), add.stride(1))
    views = STRUCTS["ConstView"](*added), STRUCTS["View"](out.data_ptr(), out.stride(1))
    affine = STRUCTS["Affine"](weight.data_ptr(), bias.data_ptr())
    native.library().sgformer_linear(
        STRUCTS["ConstView"](x.data_ptr(), x.stride(1)), affine, *views, B * H * W, n, width
    )
    return out


def depthwise_add(out, x, weight, bias):
    out = out.clone()
    native.depthwise_add(x, weight, bias, out)
    return out


def layer_norm(x, weight, bias, eps, gelu):
    out = torch.empty_like(x)
    affine = STRUCTS["Affine"](weight.data_ptr(), bias.data_ptr())
    native.library().sgformer_layer_norm(
        x.data_ptr(), out.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], affine, eps, gelu
    )
    return out


def attend_pooled(q, kv, heads):
    out = torch.empty(q.shape)
    native.attend(q, kv[:, None], heads, q.shape[1:3], (1, kv.shape[1]), out)
    return out


GRIDS = [(2, 9, 7, 64), (1, 1, 1, 20), (3, 5, 1, 33), (1, 14, 16, 100)]


@pytest.mark.slow
def test_each_kind_is_another_one(kind):
    assert native.lanes() == {"no AVX": 4, "AVX2": 8}.get(kind, native.lanes())
    assert native.lanes() in (4, 8, 16)


@pytest.mark.parametrize("rows, n, width", [(1, 1, 1), (5, 7, 9), (13, 33, 100), (100, 64, 64), (7, 300, 65)])
def test_linear(rows, n, width):
    layer = torch.nn.Linear(n, width)
    weight, bias = native.panels(layer.weight, layer.bias)
    x, add = torch.randn(1, rows, 1, n + 3)[..., 2:-1], torch.randn(1, rows, 1, width)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    close(linear(x, weight, bias, width), expected)
    close(linear(x, weight, bias, width, add=add), expected + add)
    wide = torch.zeros(1, rows, 1, width + 4)
    linear(x, weight, bias, width, out=wide[..., 1 : width + 1])
    close(wide[..., 1 : width + 1], expected)
    assert not wide[..., 0].any() and not wide[..., width + 1 :].any()
    same = add.clone()
    linear(x, weight, bias, width, add=same, out=same)
    close(same, expected + add)


def test_what_is_added_to_products_rounds_once():
    """A stream of residuals is large next to what a layer adds to it: summed in between, it would round every step."""
    x, weight, add = torch.randn(1, 50, 1, 1024), torch.randn(64, 1024) / 1e5, 1 + torch.rand(1, 50, 1, 64)
    got = native.linear(x, *native.panels(weight, None), 64, add=add)
    expected = x.double() @ weight.double().t() + add
    assert (got - expected).abs().max() <= 2**-23 + 1e-8


@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 2, 1), (8, 8, 0), (2, 2, 0)])
@pytest.mark.parametrize("grid", [(2, 16, 24, 3), (1, 9, 13, 40), (1, 1, 2, 16)])
def test_convolution(kernel, stride, padding, grid):
    x, layer = torch.randn(grid), torch.nn.Conv2d(grid[-1], 37, kernel, stride, padding)
    weight, bias = native.panels(layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias)
    padded = image(x)
    if not padding:  # what the last step sticks out by is zero
        padded = F.pad(padded, (0, -grid[2] % kernel, 0, -grid[1] % kernel))
    expected = F.conv2d(padded, layer.weight.double(), layer.bias.double(), stride, padding)
    close(native.conv(x, weight, bias, 37, kernel, stride, padding), tokens(expected))


@pytest.mark.parametrize("grid", [(2, 9, 7, 64), (1, 1, 1, 16), (1, 6, 8, 48)])
def test_winograd(grid):
    x, weight = torch.randn(grid), torch.randn(32, grid[-1], 3, 3) / 10
    expected = tokens(F.conv2d(image(x), weight.double(), padding=1))
    close(native.winograd(x, native.winograd_panels(weight), 32), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_depthwise(grid):
    C = grid[-1]
    x, weight, bias = torch.randn(grid) * 2, torch.randn(C, 1, 3, 3), torch.randn(C)
    taps = native.tap_major(weight)
    expected = tokens(F.conv2d(image(x), weight.double(), bias.double(), padding=1, groups=C))
    close(native.depthwise_gelu(x, taps, bias), F.gelu(expected))
    same = x.clone()
    assert torch.equal(native.depthwise_gelu(same, taps, bias, out=same), native.depthwise_gelu(x, taps, bias))
    wide, out = torch.randn(*grid[:-1], 3 * C), torch.randn(grid)
    wide[..., C : 2 * C] = x
    close(depthwise_add(out, wide[..., C : 2 * C], taps, bias), out + expected)
    expected = tokens(F.conv2d(image(x), weight.double(), stride=2, padding=1, groups=C))
    close(native.depthwise_stride2(x, taps), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("gelu", [False, True])
def test_norms(grid, gelu):
    C = grid[-1]
    act = F.gelu if gelu else lambda x: x
    x, more, weight, bias = torch.randn(grid) * 3 + 50, torch.randn(grid), torch.randn(C), torch.randn(C)
    parameters = weight.double(), bias.double()
    close(
        layer_norm(x, weight, bias, 1e-6, gelu),
        act(F.layer_norm(x.double(), (C,), *parameters, 1e-6)),
        1e-4,
    )
    total = x + more
    got = layer_norm(total, weight, bias, 1e-6, False)
    assert torch.equal(total, x + more)
    close(got, F.layer_norm(total.double(), (C,), *parameters, 1e-6), 1e-4)
    expected = act(tokens(F.group_norm(image(x), 1, *parameters, 1e-5)))
    close(native.group_norm(x, weight, bias, 1e-5, gelu), expected, 1e-4)
    same = x.clone()
    close(native.group_norm(same, weight, bias, 1e-5, gelu, inplace=True), expected, 1e-4)
    assert torch.equal(same, native.group_norm(x, weight, bias, 1e-5, gelu))


def test_norms_of_a_constant_are_their_bias():
    x, weight, bias = torch.full((2, 8, 8, 48), 7.0), torch.randn(48), torch.randn(48)
    assert torch.allclose(native.layer_norm(x, weight, bias, 1e-6), bias)
    assert torch.allclose(native.group_norm(x, weight, bias, 1e-5, False), bias)


def test_gelu_is_exact_everywhere():
    x = torch.cat([torch.linspace(-12, 12, 16001), torch.tensor([-1e4, 1e4, 0.0])])
    ones, zero = torch.zeros(9, 1), torch.zeros(1)
    ones[4] = 1  # the convolution that changes nothing
    got = native.depthwise_gelu(x.view(1, -1, 1, 1), ones, zero).flatten()
    assert ((got - F.gelu(x.double())).abs() / x.abs().clamp(min=1)).max() < 4e-7
    assert got[-3] == 0 and got[-2] == 1e4


ATTENTION = pytest.mark.parametrize(
    "grid, scale, window, heads, d",
    [
        ((14, 21), 1, 7, 2, 32),
        ((16, 24), 4, 7, 1, 24),  # windows of queries and keys stick out
        ((9, 5), 1, 7, 3, 20),
        ((30, 17), 2, 0, 2, 8),  # is_global
        ((5, 3), 8, 7, 1, 64),
        ((64, 48), 2, 0, 1, 70),  # many keys and queries
    ],
)


def attention_of(grid, scale, window, heads, d):
    H, W = grid
    q = torch.randn(2, H, W, 3 * heads * d)[..., heads * d : 2 * heads * d]
    kv = torch.randn(2, -(-H // scale), -(-W // scale), 2 * heads * d)
    return q, kv, ((window * scale,) * 2, (window,) * 2) if window else (grid, tuple(kv.shape[1:3]))


@ATTENTION
def test_attention_and_what_keys_received(grid, scale, window, heads, d):
    q, kv, windows = attention_of(grid, scale, window, heads, d)
    expected, significance = attend_scale(q.double(), kv.double(), heads, scale, window, is_global=not window)
    out = torch.full((2, *grid, 2 * heads * d), 9.0)
    received = native.attend(q, kv, heads, *windows, out[..., heads * d :], reduction=scale)
    close(out[..., heads * d :], expected)
    assert (out[..., : heads * d] == 9).all()
    assert torch.allclose(received.double(), significance, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("M", [1, 49, 60, 147, 1000])
def test_attention_to_pooled_tokens(M):
    q, kv = torch.randn(2, 6, 5, 64), torch.randn(2, M, 128)
    k, v = (ops.split_heads(t, 2) for t in kv.double().chunk(2, -1))
    expected = ops.join_heads(ops.attend(ops.split_heads(q.double().flatten(1, 2), 2), k, v))
    close(attend_pooled(q, kv, 2).flatten(1, 2), expected)


def test_attention_stands_large_scores():
    q, kv = 100 * torch.randn(1, 4, 4, 32), 100 * torch.randn(1, 50, 64)
    out = attend_pooled(q, kv, 1)
    k, v = kv.double().chunk(2, -1)
    close(out.flatten(1, 2), ops.attend(q.double().flatten(1, 2)[:, None], k[:, None], v[:, None])[:, 0], 1e-4)


@pytest.mark.parametrize("C", [64, 37])
def test_aggregation(C):
    x, significance = torch.randn(2, 100, C), torch.randn(2, 100)
    groups = ops.group_tokens(ops.sort_tokens(significance), [0.25, 0.5, 0.25], [9, 5, 1])
    weights, bias = [torch.randn(1, r) for r in (9, 5, 1)], [torch.randn(1) for _ in range(3)]
    expected = ops.aggregate(x.double(), groups, [w.double() for w in weights], [b.double() for b in bias])
    close(native.aggregate(x, groups, weights, bias), expected)


def test_argsort_is_the_stable_one():
    values = torch.randn(4, 1000).round(decimals=1)  # with many equal ones
    values[0, 5], values[0, 9], values[1] = float("nan"), float("-inf"), 0
    values[2, ::3], values[2, 1::3] = 0.0, -0.0
    assert torch.equal(native.argsort(values), values.argsort(dim=1, stable=True))
    values = torch.rand(2, 3137) * 1e-30
    assert torch.equal(native.argsort(values), values.argsort(dim=1, stable=True))


@pytest.mark.parametrize("grid", [(14, 14), (9, 20), (3, 2)])
@pytest.mark.parametrize("coarse", ["global", "window"])
@torch.no_grad()
def test_whole_blocks(grid, coarse):
    """Every kind of block of every stage, as the network has them, against itself in float64."""
    model = sgformer.create_model("sgformer_n", coarse=coarse, num_classes=0).eval()
    for parameter in model.parameters():  # biases and norms away from 0 and 1
        parameter.add_(0.05 * torch.randn_like(parameter))
    exact, fast = copy.deepcopy(model).double(), sgformer.optimize(model, native=True)
    kinds = set()
    for before, after in zip(exact.stages, fast.stages, strict=True):
        x, maps = torch.randn(2, *grid, before.norm.normalized_shape[0]), ()
        for block, native_block in zip(before.blocks, after.blocks, strict=True):
            kinds.add(type(native_block).__name__)
            if isinstance(block, GuidedBlock):  # sorted by numbers whose sums both have
                maps = tuple((t.float() * 2**14).round() / 2**14 for t in maps)
                expected, got = block(x.double(), *(t.double() for t in maps))[0], native_block(x, *maps)[0]
            elif isinstance(block, HybridBlock):
                (expected, *maps), (got, *received) = block(x.double()), native_block(x)
                for a, b in zip(received, maps, strict=True):
                    assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-8)
            else:
                expected, got = block(x.double()), native_block(x)
            close(got, expected, 2e-5)
    assert kinds == {"NativeHybrid", "NativeGuided", "NativePlain"}


def test_what_lies_elsewhere_in_memory_is_refused():
    weight, bias = native.panels(torch.randn(8, 32), None)
    with pytest.raises(ValueError, match="contiguous"):
        native.linear(torch.randn(1, 8, 8, 32).transpose(1, 2), weight, bias, 8)
    with pytest.raises(ValueError, match="contiguous"):
        native.layer_norm(torch.randn(1, 8, 8, 32)[..., ::2], torch.ones(16), torch.zeros(16), 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        native.depthwise_add(
            torch.randn(1, 8, 8, 32)[:, ::2], torch.ones(9, 32), torch.zeros(32), torch.ones(1, 4, 8, 32)
        )


# -- gradients --------------------------------------------------------------------------------------------------------


def exact(function, gradient, *inputs):
    """Gradients by autograd in float64."""
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, gradient.double())


@pytest.mark.parametrize("rows, n, width", [(1, 1, 1), (5, 7, 9), (130, 33, 100), (2500, 64, 64), (7, 300, 65)])
def test_gradients_of_a_linear_map(rows, n, width):
    x, weight, bias, gradient = (torch.randn(*shape) for shape in ((rows, n), (width, n), (width,), (rows, width)))
    g_x, g_weight, g_bias = exact(F.linear, gradient, x, weight, bias)
    back = native.pack(weight, transposed=True)
    close(native.linear(gradient.view(1, rows, 1, width), back, native.padded(None, n), n).view(rows, n), g_x)
    sums = torch.ones(width, n), torch.ones(width)
    native.linear_gradient(gradient, x, *sums, add=True)
    close(sums[0], 1 + g_weight)
    close(sums[1], 1 + g_bias)
    native.linear_gradient(gradient, x, sums[0], None)
    close(sums[0], g_weight)
    assert (sums[1] - 1 - g_bias).abs().max() < 1e-3
    native.linear_gradient(gradient[:0], x[:0], *sums)
    assert not sums[0].any() and not sums[1].any()


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_of_a_depthwise_convolution(grid):
    C = grid[-1]
    x, weight, bias, gradient = torch.randn(grid), torch.randn(C, 1, 3, 3), torch.randn(C), torch.randn(grid)
    taps = native.tap_major(weight)

    def plain(x, weight, bias):
        return tokens(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=C))

    def check(expected, g_x, made):
        close(g_x, expected[0])
        close(made[:9].t().reshape(C, 1, 3, 3), expected[1])
        close(made[9], expected[2])

    wide, out = torch.randn(*grid[:-1], 3 * C), torch.full((*grid[:-1], 2 * C), 9.0)
    wide[..., C : 2 * C] = x
    made = native.depthwise_backward(wide[..., C : 2 * C], gradient, taps, out[..., :C])
    check(exact(plain, gradient, x, weight, bias), out[..., :C], made)
    assert (out[..., C:] == 9).all()
    same, a = gradient.clone(), torch.empty(grid)
    made = native.depthwise_backward(x, same, taps, same, bias, a)
    check(exact(lambda *of: F.gelu(plain(*of)), gradient, x, weight, bias), same, made)
    assert (
        torch.equal(a, native.depthwise_gelu(x, taps, bias))
        or (a - native.depthwise_gelu(x, taps, bias)).abs().max() < 1e-6
    )


@pytest.mark.parametrize("grid", [(2, 9, 7, 64), (1, 1, 1, 16), (1, 70, 68, 48)])
def test_gradient_of_winograd(grid):
    x, weight, gradient = torch.randn(grid), torch.randn(32, grid[-1], 3, 3), torch.randn(*grid[:-1], 32)
    g_x, g_weight = exact(lambda x, w: tokens(F.conv2d(x.permute(0, 3, 1, 2), w, padding=1)), gradient, x, weight)
    close(native.winograd_gradient(gradient, x), g_weight)
    turned = native.winograd_panels(weight.flip(2, 3).transpose(0, 1))
    close(native.winograd(gradient, turned, grid[-1]), g_x)


@pytest.mark.parametrize("kernel, stride, padding", [(3, 2, 1), (3, 1, 1), (5, 2, 2), (1, 1, 0), (2, 2, 0), (3, 3, 1)])
@pytest.mark.parametrize("grid", [(2, 9, 7, 64), (1, 3, 2, 16), (1, 8, 6, 80)])
def test_gradient_of_convolution(kernel, stride, padding, grid):
    weight = torch.randn(21, grid[-1], kernel, kernel)
    x = torch.randn(grid)
    conv = functools.partial(F.conv2d, stride=stride, padding=padding)
    gradient = torch.randn_like(tokens(conv(x.permute(0, 3, 1, 2), weight)))
    _, expected = exact(lambda x, w: tokens(conv(x.permute(0, 3, 1, 2), w)), gradient, x, weight)
    close(native.conv_gradient(gradient.contiguous(), x, kernel, stride, padding), expected)


@pytest.mark.parametrize("grid", [*GRIDS, (2, 30, 40, 48)])
@pytest.mark.parametrize("adds", [False, True])
def test_gradients_of_layer_norm(grid, adds):
    C = grid[-1]
    x, weight, bias, gradient = torch.randn(grid) * 3 + 5, torch.randn(C), torch.randn(C), torch.randn(grid)
    more = torch.randn(grid) if adds else None
    expected = exact(lambda x, w, b: F.layer_norm(x, (C,), w, b, 1e-6), gradient, x, weight, bias)
    same = gradient.clone()
    g_x, g_weight, g_bias = native.layer_norm_backward(same, x, weight, bias, 1e-6, more)
    assert g_x is same
    close(g_x, expected[0] + more if adds else expected[0], 2e-5)
    close(g_weight, expected[1], 2e-5)
    close(g_bias, expected[2], 2e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_of_group_norm(grid, gelu):
    C = grid[-1]
    x, weight, bias, gradient = torch.randn(grid) * 3 + 5, torch.randn(C), torch.randn(C), torch.randn(grid)

    def norm(x, weight, bias):
        normed = tokens(F.group_norm(x.permute(0, 3, 1, 2), 1, weight, bias, 1e-5))
        return F.gelu(normed) if gelu else normed

    got = native.group_norm_backward(gradient, x, weight, bias, 1e-5, gelu)
    for g, expected in zip(got, exact(norm, gradient, x, weight, bias), strict=True):
        close(g, expected, 2e-5)


@ATTENTION
def test_gradients_of_attention(grid, scale, window, heads, d):
    q, kv, windows = attention_of(grid, scale, window, heads, d)
    gradient = torch.randn(2, *grid, heads * d)
    expected = exact(lambda q, kv: attend_scale(q, kv, heads, scale, window, not window)[0], gradient, q, kv)
    g_q, g_kv = torch.full((2, *grid, 2 * heads * d), 9.0), torch.full_like(kv, 9)
    native.attend_backward(q, kv, gradient, g_q[..., heads * d :], g_kv, heads, *windows)
    close(g_q[..., heads * d :], expected[0])
    close(g_kv, expected[1])
    assert (g_q[..., : heads * d] == 9).all()


@pytest.mark.parametrize("C", [64, 37])
def test_gradients_of_aggregation(C):
    x, significance = torch.randn(2, 100, C), torch.randn(2, 100)
    groups = ops.group_tokens(ops.sort_tokens(significance), [0.25, 0.5, 0.25], [9, 7, 1])
    weights, biases = [torch.randn(1, r) for r in (9, 7, 1)], [torch.randn(1) for _ in range(3)]
    gradient = torch.randn(2, sum(g.shape[1] for g in groups), C)
    expected = exact(lambda x, *of: ops.aggregate(x, groups, of[:3], of[3:]), gradient, x, *weights, *biases)
    out = torch.ones_like(x)
    g_weights, g_biases = native.aggregate_backward(gradient, x, groups, weights, out)
    close(out, 1 + expected[0])  # added to what was there
    for got, wanted in zip([*g_weights, *g_biases], expected[1:], strict=True):
        close(got, wanted)


def test_gradients_have_the_same_bits_with_any_number_of_threads():
    x, gradient, weight = torch.randn(2, 40, 30, 48), torch.randn(2, 40, 30, 48), torch.randn(48)
    taps, kv = torch.randn(9, 48), torch.randn(2, 5, 4, 96)
    groups = ops.group_tokens(ops.sort_tokens(torch.randn(2, 1200)), [0.5, 0.5], [4, 1])

    def everything():
        sums, q_out, kv_out, out = torch.zeros(48, 48), torch.empty_like(x), torch.empty_like(kv), torch.zeros_like(x)
        native.linear_gradient(gradient, x, sums, None)
        native.attend_backward(x, kv, gradient, q_out, kv_out, 2, (40, 30), (5, 4))
        weights = native.aggregate_backward(
            torch.ones(2, 750, 48), x.flatten(1, 2), groups, [torch.ones(1, 4), torch.ones(1, 1)], out.flatten(1, 2)
        )
        found = [sums, q_out, kv_out, out, *weights[0], *weights[1], native.winograd_gradient(gradient, x)]
        found += [*native.group_norm_backward(gradient, x, weight, weight, 1e-5, True)]
        found += [*native.layer_norm_backward(gradient.clone(), x, weight, weight, 1e-5, x)]
        found += [native.conv_gradient(gradient[:, :20, :15].contiguous(), x, 3, 2, 1)]
        return [*found, native.depthwise_backward(x, gradient, taps, torch.empty_like(x))]

    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            seen.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


# -- the interface ----------------------------------------------------------------------------------------------------


def test_every_function_of_the_sources_is_declared():
    defined = [
        found
        for path in native.build.sources()
        if path.suffix == ".cpp"
        for found in re.findall(r"^\w+ (sgformer_\w+)\(", path.read_text(), re.MULTILINE)
    ]
    assert len(defined) == len(set(defined)) and set(defined) == set(FUNCTIONS)


def test_structs_are_laid_out_as_the_compiler_does(once, tmp_path):
    """Names, sizes and places of all fields of all structs, and the types of all arguments, by the compiler's word."""
    lines, expected = [], []
    for name, struct in STRUCTS.items():
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, kind in struct._fields_:
            where = f"offsetof({name}, {field}), sizeof({name}::{field}), is_float<decltype({name}::{field})>"
            lines.append(f'std::printf("{field} %zu %zu %d\\n", {where});')
            expected.append(f"{field} {getattr(struct, field).offset} {ctypes.sizeof(kind)} {kind is ctypes.c_float:d}")
    for name, (result, arguments) in FUNCTIONS.items():
        lines.append(f"tell({name});")
        expected.append(" ".join(map(spelled, (result, *arguments))))
    source = """
#include <cstddef>
#include <cstdio>
#include <type_traits>
#include "interface.h"
template <class T> constexpr bool is_float = std::is_same_v<T, float>;
template <class T> void tell_one() {
  using P = std::remove_pointer_t<std::remove_reference_t<T>>;
  constexpr bool pointer = std::is_pointer_v<T> || std::is_reference_v<T>, structure = std::is_class_v<P>;
  if constexpr (std::is_void_v<T>) std::printf("void");
  else if (pointer) std::printf(structure ? "&%zu" : "*", sizeof(P));
  else std::printf("%s%zu", structure ? "struct" : is_float<T> ? "float" : "int", sizeof(P));
}
template <class R, class... A> void tell(R (*)(A...)) {
  tell_one<R>();
  ((std::printf(" "), tell_one<A>()), ...);
  std::printf("\\n");
}
int main() { MAIN }
"""
    (tmp_path / "told.cpp").write_text(source.replace("MAIN", "\n".join(lines)))
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++", "clang++"))))
    folder = Path(native.build.SOURCE).parent
    # Functions are named and not called: what defines them is not linked.
    command = [compiler, "-std=c++17", "-O0", f"-I{folder}", "told.cpp", "-o", "told"]
    subprocess.run([*command, str(folder / "kernels.cpp"), "-fopenmp"], cwd=tmp_path, check=True, timeout=300)
    told = subprocess.run([str(tmp_path / "told")], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.splitlines() == expected


def spelled(kind):
    """A type of ctypes as the program above tells it."""
    if kind is None:
        return "void"
    if kind is ctypes.c_void_p:
        return "*"
    if issubclass(kind, ctypes._Pointer):
        return f"&{ctypes.sizeof(kind._type_)}"
    word = "struct" if issubclass(kind, ctypes.Structure) else "float" if kind is ctypes.c_float else "int"
    return f"{word}{ctypes.sizeof(kind)}"


def test_what_the_interface_cannot_say_is_refused():
    with pytest.raises(ValueError, match="double"):
        parse('extern "C" void sgformer_f(unsigned double x);')
    with pytest.raises(AttributeError, match="pitch"):
        STRUCTS["View"](data=0, pitch=1)
    pair = torch.ones(8), torch.zeros(8)
    for parts in ({"norm": pair}, {"norm": pair, "proj_in": pair, "norm3": pair}):
        with pytest.raises(ValueError, match="PlainWeights has norm, proj_in"):
            native.Weights("PlainWeights", **parts)


# -- compiling --------------------------------------------------------------------------------------------------------


def fresh(code, **environment):
    """Run Python code in a process of its own, which has compiled nothing yet."""
    env = {**os.environ, "PYTHONPATH": str(Path(ops.__file__).parents[2]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


LOAD = "from sgformer.backends import native; print(native.lanes())"


@pytest.mark.slow
def test_compiled_once_and_found_again(once, tmp_path):
    assert fresh(LOAD, XDG_CACHE_HOME=str(tmp_path)).returncode == 0
    (file,) = (tmp_path / "sgformer").iterdir()
    before = file.stat().st_mtime_ns
    assert fresh(LOAD, XDG_CACHE_HOME=str(tmp_path)).returncode == 0
    assert list((tmp_path / "sgformer").iterdir()) == [file] and file.stat().st_mtime_ns == before
    file.write_bytes(b"damaged")
    assert fresh(LOAD, XDG_CACHE_HOME=str(tmp_path)).returncode == 0
    assert list((tmp_path / "sgformer").iterdir()) == [file] and file.stat().st_size > 10_000


def test_every_source_makes_another_library(once, tmp_path, monkeypatch):
    """One that is changed, added or renamed: no stale library is found in the cache."""
    folder = tmp_path / "native"
    shutil.copytree(native.build.SOURCE.parent, folder)
    monkeypatch.setattr(native.build, "SOURCE", folder / "kernels.cpp")
    files = native.build.sources()
    assert {"kernels.cpp", "interface.h", "gemm.h", "attention.cpp"} < {path.name for path in files}
    names = [native.build._file_name()]
    for path in files:
        path.write_text(path.read_text() + "// changed")
        names.append(native.build._file_name())
    (folder / "more.h").write_text("")
    names.append(native.build._file_name())
    (folder / "more.h").rename(folder / "most.h")
    names.append(native.build._file_name())
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("why", ["none", "fails"])
def test_without_a_compiler_the_network_is_packed_all_the_same(once, tmp_path, why):
    if why == "fails":
        (tmp_path / "g++").write_text("#!/bin/sh\necho 'kernels.cpp:1: error: too old' >&2\nexit 1\n")
        (tmp_path / "g++").chmod(0o755)
    code = """
import sgformer, torch
from sgformer.backends import native
from sgformer.backends.native.interface import FUNCTIONS, STRUCTS, parse
model = sgformer.create_model("sgformer_n").eval()
image = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    assert torch.allclose(sgformer.optimize(model)(image), model(image), atol=1e-4)
try:
    sgformer.optimize(model, native=True)
except native.UnavailableError as error:
    print(error)
"""
    done = fresh(code, XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr
    assert ("no C++ compiler" if why == "none" else "too old") in done.stdout
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.slow
def test_a_home_that_cannot_be_written_to_does_not_matter(once, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = fresh(LOAD, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "in the way"
    homeless = "import pathlib\n\ndef home():\n    raise RuntimeError\n\npathlib.Path.home = home\n" + LOAD
    done = fresh(homeless, XDG_CACHE_HOME="")
    assert done.returncode == 0, done.stderr
