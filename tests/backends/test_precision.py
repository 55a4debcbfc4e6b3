"""Linear maps in 16 and 8 bits against the references in plain torch, and networks made of them."""

import copy
import functools
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from photos import make_photos

import sgformer
from sgformer.backends import native
from sgformer.core.errors import UserError
from sgformer.models.backbone import GuidedBlock, HybridBlock
from sgformer.models.layers import ClassifierHead, Downsample, Stem
from sgformer.ops import reference

REFERENCES = {"bf16": reference.linear_bf16, "int8": reference.linear_int8}


def has(precision):
    try:
        native.kind(precision)
    except native.UnavailableError:
        return False
    return True


def has_kind(number):
    try:
        return bool(native.library().sgformer_has(number))
    except native.UnavailableError:
        return False


def in_tiles(precision):
    return native.kind(precision) in (native.BF16_TILES, native.INT8_TILES)


#: By name: number of the kernels, reference. Of those of a precision, a processor takes the quickest.
KINDS = {
    "bf16 in pairs": (native.BF16_PAIRS, "bf16"),
    "bf16 by float32": (native.BF16_SINGLE, "bf16"),
    "bf16 in tiles": (native.BF16_TILES, "bf16"),
    "int8": (native.INT8, "int8"),
    "int8 in tiles": (native.INT8_TILES, "int8"),
}
KINDS = [
    pytest.param(number, REFERENCES[name], id=kind, marks=pytest.mark.skipif(not has_kind(number), reason="not here"))
    for kind, (number, name) in KINDS.items()
]
PRECISIONS = [
    pytest.param(name, marks=pytest.mark.skipif(not has(name), reason=f"no {name} here")) for name in REFERENCES
]
needs_int8 = pytest.mark.skipif(not has("int8"), reason="no int8 here")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def close(got, expected):
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max().clamp(min=1e-30)


# -- kernels ----------------------------------------------------------------------------------------------------------

# A lone number, odd sizes, panels with every number of vectors, the network's own; few rows are cut by columns.
SHAPES = [
    (1, 1, 1),
    (5, 7, 9),
    (13, 33, 17),
    (6, 64, 48),
    (49, 256, 100),
    (400, 130, 129),
    (196, 64, 256),
    (7, 1000, 65),
]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("rows, n, width", SHAPES)
@pytest.mark.parametrize("kind, expected", KINDS)
def test_linear_is_its_reference(kind, expected, rows, n, width, batch, threads):
    x = torch.randn(batch, rows, 1, n) * torch.rand(batch, rows, 1, 1) * 3 + torch.randn(batch, rows, 1, 1)
    weight, bias, add = (
        torch.randn(width, n) * torch.rand(width, 1),
        torch.randn(width),
        torch.randn(batch, rows, 1, width),
    )
    packed = native.narrow_panels(weight, bias, kind)
    close(native.narrow_linear(x, *packed, width, kind), expected(x, weight, bias))
    close(native.narrow_linear(x, *packed, width, kind, add), expected(x, weight, bias) + add)
    nothing = native.narrow_panels(weight, None, kind)
    close(native.narrow_linear(x, *nothing, width, kind), expected(x, weight, torch.zeros(width)))


@pytest.mark.skipif(not has_kind(native.INT8_TILES), reason="not here")
@pytest.mark.parametrize("rows, n, width", SHAPES)
def test_tiles_of_integers_are_exact(rows, n, width, threads):
    x, weight, bias = torch.randn(1, rows, 1, n), torch.randn(width, n), torch.randn(width)
    packed = native.narrow_panels(weight, bias, native.INT8)
    assert torch.equal(*(native.narrow_linear(x, *packed, width, kind) for kind in (native.INT8, native.INT8_TILES)))


@pytest.mark.parametrize("grid, C, width, stride", [((8, 8), 16, 16, 1), ((9, 7), 3, 33, 2), ((57, 41), 24, 70, 1)])
@pytest.mark.parametrize("kind, expected", KINDS)
def test_padded_patches_are_the_reference(kind, expected, grid, C, width, stride, threads):
    x, weight, bias = torch.randn(2, *grid, C), torch.randn(width, C, 3, 3), torch.randn(width)
    packed = native.narrow_panels(native.conv_matrix(weight), bias, kind)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    patches = padded.unfold(1, 3, stride).unfold(2, 3, stride).permute(0, 1, 2, 4, 5, 3).flatten(3)
    got = native.narrow_conv(x, *packed, width, 3, stride, kind, 1)
    close(got, expected(patches, native.conv_matrix(weight), bias))


@pytest.mark.parametrize("grid, kernel, C, width", [((8, 8), 4, 16, 16), ((9, 7), 2, 20, 33), ((3, 2), 4, 5, 70)])
@pytest.mark.parametrize("kind, expected", KINDS)
def test_patches_are_the_reference(kind, expected, grid, kernel, C, width, threads):
    x, weight, bias = torch.randn(2, *grid, C), torch.randn(width, C, kernel, kernel), torch.randn(width)
    packed = native.narrow_panels(native.conv_matrix(weight), bias, kind)
    padded = F.pad(x, (0, 0, 0, -grid[1] % kernel, 0, -grid[0] % kernel))
    patches = padded.unfold(1, kernel, kernel).unfold(2, kernel, kernel).permute(0, 1, 2, 4, 5, 3).flatten(3)
    got = native.narrow_conv(x, *packed, width, kernel, kernel, kind)
    close(got, expected(patches, native.conv_matrix(weight), bias))


@pytest.mark.parametrize("kind, expected", KINDS)
def test_normalized_tokens_are_the_reference_but_for_numbers_between_two_steps(kind, expected, threads):
    x, weight, bias = torch.randn(2, 9, 11, 40) + 1, torch.randn(70, 40), torch.randn(70)
    norm = 1 + 0.1 * torch.randn(40), torch.randn(40)
    got = native.narrow_norm_linear(x, norm, 1e-6, *native.narrow_panels(weight, bias, kind), 70, kind)
    normed = native.layer_norm(x, *norm, 1e-6)
    wanted = expected(normed, weight, bias)
    off = (got - wanted).abs().amax(-1)
    assert (off <= 2e-6 * wanted.abs().max()).float().mean() > 0.9  # of tokens
    assert off.max() <= 2 * normed.abs().max() / 127 * weight.abs().max()


@pytest.mark.parametrize("kind, expected", KINDS)
def test_extreme_tokens(kind, expected):
    weight, bias = torch.randn(20, 30), torch.randn(20)
    packed = native.narrow_panels(weight, bias, kind)
    x = torch.randn(1, 1, 8, 30)
    x[..., 0, :], x[..., 1, :], x[..., 2, :] = 0, 5, -5  # nothing; of one sign
    x[..., 3, :] *= 1e30
    x[..., 4, :] *= 1e-20
    got, wanted = native.narrow_linear(x, *packed, 20, kind), expected(x, weight, bias)
    for a, b in zip(got.flatten(0, 2), wanted.flatten(0, 2), strict=True):
        close(a, b)
    assert torch.equal(got[0, 0, 0], bias)
    for strange in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[0, 0, 6, 17] = strange
        out = native.narrow_linear(broken, *packed, 20, kind)[0, 0]
        assert not out[6].isfinite().any() and torch.equal(out[[5, 7]], got[0, 0, [5, 7]])


def test_short_gelu():
    x = torch.cat([torch.linspace(-8, 8, 20000), torch.linspace(-1e4, 1e4, 4000)]).view(1, 1, -1, 1)
    identity, nothing = torch.zeros(9, 1), torch.zeros(1)
    identity[4] = 1
    got = native.depthwise_gelu(x, identity, nothing, is_short=True)
    assert (got - F.gelu(x.double())).abs().max() < 1e-4


# -- networks ---------------------------------------------------------------------------------------------------------


def twin(model, precision):
    """A network of torch's modules, with the reference in the place of what `optimize` computes in this precision."""

    def mapped(linear, x, linear_of):
        return linear_of(x, linear.weight, linear.bias)

    def patches(conv, x, linear_of):
        cut = F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride).transpose(1, 2)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
        rows = (x.shape[2] + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1
        return linear_of(cut[:, None], conv.weight.flatten(1), bias)[:, 0].transpose(1, 2).unflatten(2, (rows, -1))

    model = copy.deepcopy(model)
    exact, halves = {"bf16": ((Stem, ClassifierHead), ()), "int8": ((Stem, ClassifierHead, Downsample), ())}[precision]
    if in_tiles(precision):
        exact, halves = (ClassifierHead,), (Stem, Downsample)
    within = {m: REFERENCES["bf16"] for part in model.modules() if isinstance(part, halves) for m in part.modules()}
    within |= {m: None for part in model.modules() if isinstance(part, exact) for m in part.modules()}
    for module in model.modules():
        if (linear_of := within.get(module, REFERENCES[precision])) is None:
            continue
        if isinstance(module, nn.Linear):
            module.forward = types.MethodType(functools.partial(mapped, linear_of=linear_of), module)
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            module.forward = types.MethodType(functools.partial(patches, linear_of=linear_of), module)
    return model


def apart(a, b):
    return (a - b).norm() / b.norm()


@pytest.mark.parametrize("grid", [(12, 20), (8, 4)])
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_every_part_is_its_twin(model, precision, grid):
    """Up to numbers that fall to another step, which is far less than what rounding does to the part."""
    fast, slow = sgformer.optimize(model, precision=precision), twin(model, precision)
    for part, rounded, exact in zip(fast.stages, slow.stages, model.stages, strict=True):
        parts, maps = [(part.downsample, rounded.downsample, exact.downsample)], ()
        parts += zip(part.blocks, rounded.blocks, exact.blocks, strict=True)
        for got, wanted, full in parts[isinstance(exact.downsample, nn.Identity) :]:
            width = full.norm1.normalized_shape[0] if hasattr(full, "norm1") else full.expand.conv.in_channels
            x = torch.randn(2, *grid, width)
            hybrid, guided = isinstance(full, HybridBlock), isinstance(full, GuidedBlock)
            outs = [each(x, *(maps if guided else ())) for each in (got, wanted, full)]
            if hybrid:  # for the next block: sorted by numbers whose sums are the same in each
                maps = tuple((t * 2**14).round() / 2**14 for t in outs[2][1:])
            if hybrid or guided:
                outs = [out[0] for out in outs]
            if isinstance(full, Downsample) and precision == "int8" and not in_tiles(precision):
                assert apart(outs[0], outs[2]) < 1e-5
            else:
                assert apart(outs[0], outs[1]) < 0.4 * apart(outs[1], outs[2]) < 0.05


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_of_none(model, precision):
    assert sgformer.optimize(model, precision=precision)(torch.zeros(0, 3, 75, 64)).shape == (0, model.num_classes)


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_results_depend_on_the_image_alone(model, precision, monkeypatch):
    fast = sgformer.optimize(model, precision=precision)
    images = torch.randn(5, 3, 96, 150)
    together = fast(images)
    assert torch.equal(torch.cat([fast(image[None]) for image in images]), together)
    monkeypatch.setattr("sgformer.backends.native.CHUNK", 1)
    assert torch.equal(fast(images), together)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(fast(images), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(copy.deepcopy(fast)(images), together)
    assert fast(images[:0]).shape == (0, 5)


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_no_broken_number_is_hidden(model, precision):
    image = torch.randn(2, 3, 64, 64)
    image[0, 1, 20, 30] = torch.nan
    out = sgformer.optimize(model, precision=precision)(image)
    assert out[0].isnan().all() and out[1].isfinite().all()
    for value in (torch.nan, torch.inf):
        broken = copy.deepcopy(model)
        broken.stages[1].blocks[0].mlp.fc1.weight[0, 0] = value
        assert not sgformer.optimize(broken, precision=precision)(torch.randn(1, 3, 64, 64)).isfinite().any()


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_trained_weights_answer_as_before(precision):
    model = sgformer.create_model("sgformer_n", pretrained=True).eval()
    images = F.interpolate(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 64, mode="bicubic")
    expected, got = model(images), sgformer.optimize(model, precision=precision)(images)
    assert 0 < apart(got, expected) < 0.05
    sure = expected.topk(2)[0].diff().abs().flatten() > 0.5
    assert sure.sum() > 5 and torch.equal(got.argmax(1)[sure], expected.argmax(1)[sure])


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_the_stem_is_its_twin(model, precision):
    x = torch.randn(2, 3, 70, 96)
    got, wanted, full = (
        each.stem(x) for each in (sgformer.optimize(model, precision=precision), twin(model, precision), model)
    )
    assert apart(got, wanted) < max(1e-5, 0.1 * apart(wanted, full))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_stays_wide_is_named(model, precision):
    always = {"head.fc"}
    if not in_tiles(precision):
        always |= {"stem.conv1.conv", "stem.conv2.conv", "stem.conv3.conv"}
    layers = ("expand", "reduce", "mix") if precision == "int8" and not in_tiles(precision) else ("reduce",)
    always |= {f"stages.{i}.downsample.{layer}.conv" for i in (1, 2, 3) for layer in layers}
    assert set(sgformer.optimize(model, precision=precision).wide) == always
    changed = copy.deepcopy(model)
    changed.stages[3].blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    assert set(sgformer.optimize(changed, precision=precision).wide) > always


# -- where it cannot be -----------------------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize(
    "options, words",
    [
        ({"precision": "int4"}, "fp32, bf16, int8"),
        ({"precision": "int8", "compile": True}, "without compile"),
        ({"precision": "int8", "native": False}, "native kernels"),
        ({"precision": "int8", "pack": False}, "native kernels"),
    ],
)
def test_a_mistake_is_one_line(model, options, words):
    with pytest.raises(UserError, match=words):
        sgformer.optimize(model, **options)
    with pytest.raises(UserError, match="in float32"):
        sgformer.optimize(copy.deepcopy(model).double(), precision="int8")


@needs_int8
@pytest.mark.parametrize("precision, words", [("bf16", "AVX512-BF16"), ("int8", "AVX512-VNNI")])
def test_a_processor_without_it_is_told(model, precision, words, monkeypatch):
    without = types.SimpleNamespace(sgformer_has=lambda kind: kind == 0, sgformer_pairs_are_quick=lambda: 1)
    monkeypatch.setattr("sgformer.backends.native.ops.library", lambda: without)
    with pytest.raises(UserError, match=f"{precision} is not possible here: .*{words}; take fp32"):
        sgformer.optimize(model, precision=precision)


def test_no_compiler_is_told(model, monkeypatch):
    def missing():
        raise native.UnavailableError("there is no C++ compiler")

    monkeypatch.setattr("sgformer.backends.native.ops.library", missing)
    with pytest.raises(UserError, match="no C\\+\\+ compiler; take fp32"):
        sgformer.optimize(model, precision="int8")


# -- for users --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_predict_takes_a_precision(tmp_path, precision):
    image = make_photos(tmp_path / "photos") / "val" / "ant" / "0.png"
    plain = dict(sgformer.predict("sgformer_n", image, top=200)[0].labels)
    got = dict(sgformer.predict("sgformer_n", image, top=200, precision=precision)[0].labels)
    assert got != plain and max(abs(got[name] - plain[name]) for name in plain) < 0.1


@needs_int8
def test_predict_refuses_a_precision_where_it_is_not_for(tmp_path):
    image = make_photos(tmp_path / "photos") / "val" / "ant" / "0.png"
    with pytest.raises(UserError, match="is one of fp32, bf16, int8"):
        sgformer.predict("sgformer_n", image, precision="int4")
