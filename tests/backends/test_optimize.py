"""Prepared networks compute what the plain ones do, and leave them alone."""

import copy

import pytest
import torch
from changed_networks import CHANGES

import sgformer
from sgformer.backends import native
from sgformer.backends.native_modules import FoldedMlp, KeptPositions, NativeGuided, PackedLinear

try:
    native.library()
    NATIVE = True
except native.UnavailableError:
    NATIVE = False
needs_compiler = pytest.mark.skipif(not NATIVE, reason="no native kernels here")
WAYS = [
    pytest.param({"native": True}, marks=needs_compiler, id="native"),
    pytest.param({"native": False}, id="packed"),
    pytest.param({"pack": False}, id="folded"),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


@pytest.mark.parametrize("way", [pytest.param(None, id="plain"), *WAYS])
def test_a_batch_of_none(model, way):
    network = copy.deepcopy(model) if way is None else sgformer.optimize(model, **way)
    none = torch.zeros(0, 3, 75, 64)
    out = network(none)
    assert out.shape == (0, 5)
    assert [tuple(m.shape) for m in network.forward_intermediates(none, intermediates_only=True)] == [
        (0, 32, 19, 16),
        (0, 64, 10, 8),
        (0, 128, 5, 4),
        (0, 256, 3, 2),
    ]
    if way is None:
        out.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("size", [(224, 224), (75, 130)])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_optimize_changes_no_number_and_not_the_original(model, size, way):
    before = copy.deepcopy(model.state_dict())
    fast = sgformer.optimize(model, **way)
    kinds = {type(m) for m in fast.modules()}
    assert (NativeGuided in kinds) == bool(way.get("native")) == (FoldedMlp not in kinds)
    assert (PackedLinear in kinds) == (way.get("native") is False)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in fast.parameters())
    plain = copy.deepcopy(model).eval()
    image = torch.randn(2, 3, *size)
    seen, expected = fast.inspect(image), plain.inspect(image)
    # In float32 two tokens may swap ranks; what comes before the first sorting is exact to rounding.
    torch.testing.assert_close(seen.significance["1.0"], expected.significance["1.0"], rtol=1e-4, atol=1e-7)
    assert (seen.logits - expected.logits).abs().max() < 1e-3 * expected.logits.abs().max()
    assert torch.equal(fast(image), fast.forward_head(fast.forward_features(image)))
    for taken, expected in zip(fast.forward_intermediates(image, intermediates_only=True), seen.features, strict=True):
        assert torch.equal(taken, expected)
    assert {k: len(v) for k, v in seen.tokens.items()} == {k: len(v) for k, v in plain.inspect(image).tokens.items()}


@pytest.mark.parametrize("way", WAYS)
def test_positions_follow_the_size_and_the_table(model, way):
    """The resized table is kept between calls: of the size before, or of a table that has changed, it is not."""
    fast, small, large = sgformer.optimize(model, **way), torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 64)
    assert (type(fast.stem.position) is KeptPositions) == way.get("pack", True)
    with torch.inference_mode():
        fast(small)  # what is kept from here must serve outside, too
    first, other = fast(small), fast(large)
    assert torch.equal(fast(small), first) and torch.equal(fast(large), other)
    assert torch.equal(copy.deepcopy(fast.stem)(small), fast.stem(small))
    with torch.no_grad():
        fast.stem.position.table.mul_(-3)
        plain = copy.deepcopy(model).eval()
        plain.stem.position.table.mul_(-3)
        expected = plain(small)
    assert (fast(small) - first).abs().max() > 1e-3 * first.abs().max()
    assert (fast(small) - expected).abs().max() < 1e-3 * expected.abs().max()


@needs_compiler
@pytest.mark.parametrize("size", [(224, 224), (96, 150)])
@torch.no_grad()
def test_native_results_depend_on_the_image_alone(model, size, monkeypatch):
    """To the bit: not on the images beside it, nor on how many are taken at a time, nor on the number of threads."""
    fast = sgformer.optimize(model, native=True)
    images = torch.randn(5, 3, *size)
    together = fast(images)
    assert torch.equal(torch.cat([fast(image[None]) for image in images]), together)
    monkeypatch.setattr("sgformer.backends.native.CHUNK", 1)
    assert torch.equal(fast(images), together)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(fast(images), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(copy.deepcopy(fast)(images), together)
    assert fast(images[:0]).shape == (0, 5)


@needs_compiler
@torch.no_grad()
def test_native_hides_no_broken_number(model):
    fast = sgformer.optimize(model, native=True)
    image = torch.randn(2, 3, 64, 64)
    image[0, 1, 20, 30] = torch.nan
    out = fast(image)
    assert out[0].isnan().all() and out[1].isfinite().all()
    broken = copy.deepcopy(model)
    broken.stages[0].blocks[0].attn.proj_in.weight[0] = torch.nan  # what one head's queries are made with
    assert sgformer.optimize(broken, native=True)(torch.randn(1, 3, 64, 64)).isnan().all()


@needs_compiler
@torch.no_grad()
def test_native_takes_what_torch_defaults_to_for_nothing(model):
    fast = sgformer.optimize(model, native=True)
    image = torch.randn(2, 3, 96, 64)
    expected = fast(image)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(fast(image), expected)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(fast(image), expected)


@needs_compiler
def test_layers_that_are_called_together_can_be_watched_and_replaced(model):
    fast = sgformer.optimize(model, native=True)
    image = torch.randn(2, 3, 75, 64)
    expected, seen = fast(image), []
    layers = [fast.stem.conv2, fast.stem.conv1.conv, fast.stages[1].downsample.mix.conv]
    hooks = [layer.register_forward_hook(lambda layer, *_: seen.append(layer)) for layer in layers]
    assert torch.equal(fast(image), expected) and {*seen} == {*layers}
    for hook in hooks:
        hook.remove()
    fast.stem.conv2 = torch.nn.Identity()
    assert not torch.allclose(fast(image), expected)


@needs_compiler
def test_copies_of_a_prepared_network_have_weights_of_their_own(model):
    fast = sgformer.optimize(model, native=True)
    image = torch.randn(2, 3, 75, 64)
    expected = fast(image)  # after this, addresses of weights are kept
    assert torch.equal(fast.share_memory()(image), expected)
    copied = copy.deepcopy(fast)
    with torch.inference_mode():
        for part in (fast.stem.conv1.conv.weight, fast.stages[0].blocks[0].tail.tensors[0]):
            part.zero_()
    assert torch.equal(copied(image), expected)
    assert not torch.allclose(fast(image), expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_native_refuses_other_numbers(model, dtype):
    fast = sgformer.optimize(model, native=True)
    with pytest.raises(ValueError, match="float32 on the CPU"):
        fast(torch.zeros(1, 3, 64, 64, dtype=dtype))


@needs_compiler
def test_native_is_refused_where_it_cannot_be(model):
    with pytest.raises(ValueError, match="native"):
        sgformer.optimize(model, pack=False, native=True)
    with pytest.raises(ValueError, match="native"):
        sgformer.optimize(copy.deepcopy(model).double(), native=True)


@torch.no_grad()
def test_folding_is_exact_in_float64(model):
    plain = copy.deepcopy(model).double().eval()
    fast = sgformer.optimize(plain)
    assert not any(isinstance(m, PackedLinear) for m in fast.modules())  # packing is for float32
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(fast(image), plain(image), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="float64"):
        sgformer.optimize(plain, pack=True)


KINDS = [
    *({"aggregation": name} for name in sgformer.models.config.AGGREGATION),
    {"significance": "learned"},
    {"significance": "inverted"},
    {"attention": "linear"},
    {"coarse": "window"},
    {"pairs": "hybrid"},
    {"num_classes": 0},
    {"in_chans": 1},
]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_kind_of_network_can_be_prepared(options, way):
    plain = sgformer.create_model("sgformer_n", **options).eval()
    image = torch.randn(2, options.get("in_chans", 3), 64, 96)
    expected, fast = plain(image), sgformer.optimize(plain, **way)
    assert (fast(image) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert fast.inspect(image).tokens.keys() == plain.inspect(image).tokens.keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert (fast(image) - expected).abs().max() < 0.1 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_were_changed_afterwards_are_as_they_are(change, way):
    plain = sgformer.create_model("sgformer_n", significance="random", num_classes=5).eval()  # no rounding changes it
    for parameter in plain.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    image = torch.randn(1, 3, 64, 64)
    before = plain(image)
    CHANGES[change](plain)
    expected, fast = plain(image), sgformer.optimize(plain, **way)
    scale = expected.abs().max()
    assert (expected - before).abs().max() > 2e-5 * scale  # more than rounding
    assert (fast(image) - expected).abs().max() < 1e-4 * expected.abs().max()


class Score(torch.nn.Module):
    """Significance by a user's own network, of parts that `optimize` replaces elsewhere."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.act, self.score = torch.nn.LayerNorm(dim, bias=False), torch.nn.GELU(), torch.nn.Linear(dim, 1)

    def forward(self, x, coarse, fine):
        return self.score(self.norm(self.act(x)))[..., 0]


def one_for_all(x, coarse, fine):
    """The same for all images: (1, H, W), and in float64."""
    return torch.linspace(0, 1, x.shape[1] * x.shape[2], dtype=torch.float64).view(1, *x.shape[1:3])


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", [Score, one_for_all])
def test_significance_of_ones_own_stays_as_it_is(source, way):
    name = f"tested-{source.__name__}"
    sgformer.register_significance(name)(source)
    try:
        plain = sgformer.create_model("sgformer_n", significance=name).eval()
        image = torch.randn(2, 3, 64, 96)
        expected, fast = plain(image), sgformer.optimize(plain, **way)
        assert (fast(image) - expected).abs().max() < 1e-3 * expected.abs().max()
        seen, told = fast.inspect(image), plain.inspect(image)
        if source is one_for_all:
            for key, tokens in told.tokens.items():
                regions = tokens.region_map()
                assert torch.equal(seen.tokens[key].region_map().expand(2, -1, -1), regions.expand(2, -1, -1))
    finally:
        sgformer.models.significance.SOURCES.pop(name), sgformer.models.config.SIGNIFICANCE.pop(name)


def test_optimize_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="Linear"):
        sgformer.optimize(torch.nn.Linear(2, 2))


@pytest.mark.slow
@torch.no_grad()
def test_each_kind_of_block_is_compiled_once(model, monkeypatch):
    """With a backend that runs the graphs as they are: what is tested is how blocks are compiled, not the compiler."""
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: real(self, backend=as_it_is, **o))
    plain = sgformer.create_model("sgformer_n").double().eval()
    fast = sgformer.optimize(plain, compile=True)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(fast(image), plain(image), rtol=1e-9, atol=1e-12)
    assert len(graphs) == 2 * 3 + 1  # hybrid and guided in three stages, plain in the fourth; 11 blocks in all
    with pytest.raises(ValueError, match="opaque"):
        sgformer.optimize(plain, pack=True, compile=True)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_compiled_for_all_sizes_is_not_compiled_again(monkeypatch):
    """Sizes with and without padded windows, square and not; float64, where equal significance keeps its order."""
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: real(f, backend=as_it_is, **o))
    plain = sgformer.create_model("sgformer_n", img_size=64).double().eval()
    fast = sgformer.optimize(plain, compile=True, dynamic=True)
    counts = []
    for size in ((224, 224), (256, 320), (160, 416), (250, 231)):
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(fast(image), plain(image), rtol=1e-9, atol=1e-12)
        counts.append(len(graphs))
    assert counts[0] and counts == counts[:1] * 4


def test_what_cannot_be_compiled_for_all_sizes_is_refused():
    model = sgformer.create_model("sgformer_n", aggregation="merge")
    with pytest.raises(ValueError, match="merge"):
        sgformer.optimize(model, compile=True, dynamic=True)
    with pytest.raises(ValueError, match="compile=False"):
        sgformer.optimize(model, dynamic=True)
