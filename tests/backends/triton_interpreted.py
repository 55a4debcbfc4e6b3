"""Triton's kernels in Triton's interpreter, on the CPU, against the references in `ops`. `test_triton.py` runs this.

In a process of its own, because Triton decides when it is imported whether it interprets: TRITON_INTERPRET=1. A program
of a kernel takes about .1 s there, so the sizes are small, and odd: blocks are never full, and some cases have several.
"""

import copy

import pytest
import torch

import sgformer
from sgformer import ops
from sgformer.backends.triton import functions, interpreted, modules
from sgformer.models.config import Region, SGFormerConfig, StageConfig
from sgformer.ops import kernels, reference

assert interpreted()

# Images, heads, queries, keys, channels; whether tokens are padded.
SHAPES = [
    (2, 1, 49, 49, 16, True),  # windows with padding
    (1, 2, 49, 64, 24, False),  # all keys in one block, which they fill
    (1, 1, 70, 150, 24, True),  # several blocks of queries and keys: two passes
    (1, 1, 150, 65, 32, False),
    (1, 1, 33, 70, 64, False),  # smaller blocks, of wide heads
    (1, 2, 5, 3, 5, True),
    (1, 1, 1, 1, 1, False),
]


def inputs(B, h, N, M, d, padded, dtype):
    """As networks have them: heads are views of tokens (B, N, h * d), and some tokens are padding."""
    q, kv = torch.randn(B, N, h * d + 3, dtype=dtype), torch.randn(B, M, 2 * h * d, dtype=dtype)
    leaves = (q.requires_grad_(), kv.requires_grad_())
    heads = [ops.split_heads(t, h) for t in (q[..., : h * d], *kv.chunk(2, -1))]
    valid, real = (torch.rand(B, M) > 0.4, torch.rand(B, N) > 0.4) if padded else (None, None)
    if padded:
        valid[:, M // 2] = True
    return leaves, (*heads, valid, real)


def gradients(out, leaves):
    probe = torch.linspace(-1, 1, out.numel()).reshape(out.shape).bfloat16().to(out.dtype)  # exact in every dtype
    return torch.autograd.grad((out * probe).sum(), leaves)


def check_attention(shape, dtype, rtol, atol):
    leaves, arguments = inputs(*shape, dtype)
    precise = [t.detach().double().requires_grad_() for t in arguments[:3]]
    out, received = functions.attention_and_received(*arguments)
    assert out.dtype == dtype and received.dtype == torch.float32 and not received.requires_grad
    slow_out, slow_received = reference.attention_and_received(*precise, *arguments[3:])
    torch.testing.assert_close(out.double(), slow_out, rtol=rtol, atol=atol)
    torch.testing.assert_close(received.double(), slow_received, rtol=rtol, atol=atol)
    # The leaves' gradients, through the same views, from those of the reference.
    expected = torch.autograd.grad(arguments[:3], leaves, [g.to(dtype) for g in gradients(slow_out, precise)])
    for fast, slow in zip(gradients(out, leaves), expected, strict=True):
        assert (fast - slow).double().norm() <= rtol * slow.double().norm() + atol
    with torch.no_grad():
        again = functions.attention_and_received(*arguments)
    assert torch.equal(again[0], out) and torch.equal(again[1], received)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape):
    check_attention(shape, torch.float32, 1e-5, 2e-6)


# bfloat16 has 8 bits: inputs are the same, but softmax weights and what comes out are rounded to it, 2**-8 at a time.
# What is received is summed in float32 from products that are exact in it.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype):
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-11
    for shape in ((1, 1, 49, 49, 32, True), (1, 1, 40, 70, 16, False)):
        check_attention(shape, dtype, 4 * unit, 4 * unit)
        arguments = inputs(*shape, dtype)[1]
        _, received = functions.attention_and_received(*arguments)
        slow = reference.attention_and_received(*(t.detach().double() for t in arguments[:3]), *arguments[3:])
        torch.testing.assert_close(received.double(), slow[1], rtol=1e-5, atol=1e-6)


def test_queries_are_divided_into_parts_that_cover_all():
    for blocks in (1, 3, 100, 5000):
        for N in (1, 49, 64, 65, 3136, 65536):
            parts, span = functions._parts(blocks, N, 64)
            assert span % 64 == 0 and parts * span >= N > (parts - 1) * span
            assert parts == 1 or parts * blocks <= functions.PROGRAMS


def test_parts_of_the_queries_add_up(monkeypatch):
    monkeypatch.setattr(functions, "_parts", lambda blocks, N, block: (-(-N // block), block))
    check_attention((1, 1, 150, 65, 16, True), torch.float32, 1e-5, 2e-6)


REGIONS = {(0.25, 0.5, 0.25): (40, 7, 3), (0.5, 0.5): (2, 1), (1.0,): (5,)}


def regions(shares, N, C, dtype):
    """Groups of tokens, and leaves: tokens, weights and biases of each region."""
    rates = REGIONS[shares]
    leaves = [torch.randn(2, N, C), *(torch.randn(1, r) for r in rates), *(torch.randn(1) for _ in rates)]
    significance = torch.rand(2, N)
    groups = ops.group_tokens(ops.sort_tokens(significance), shares, rates)
    return groups, [leaf.to(dtype).requires_grad_() for leaf in leaves], (significance, shares, rates)


@pytest.mark.parametrize(("shares", "N", "C"), [((0.25, 0.5, 0.25), 37, 70), ((0.5, 0.5), 13, 16), ((1.0,), 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aggregate(shares, N, C, dtype):
    """Sums are float32, so in bfloat16 the result alone is rounded, and each gradient."""
    groups, leaves, asked = regions(shares, N, C, dtype)
    x, weights, bias = leaves[0], leaves[1 : 1 + len(shares)], leaves[1 + len(shares) :]
    precise = [leaf.detach().double().requires_grad_() for leaf in leaves]
    fast = functions.aggregate(x, groups, weights, bias)
    slow = reference.aggregate(precise[0], *asked, precise[1 : 1 + len(shares)], precise[1 + len(shares) :])
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert fast.dtype == dtype
    torch.testing.assert_close(fast.double(), slow, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(fast, leaves), gradients(slow, precise), strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() <= tolerance * b.norm() + 1e-6


def test_regions_without_tokens():
    groups, leaves, _ = regions((0.25, 0.5, 0.25), 2, 4, torch.float32)
    assert 0 in [index.shape[1] for index in groups]
    fast, slow = (run(leaves[0], groups, leaves[1:4], leaves[4:]) for run in (functions.aggregate, ops.aggregate))
    for a, b in zip([fast, *gradients(fast, leaves)], [slow, *gradients(slow, leaves)], strict=True):
        torch.testing.assert_close(a, b)


def test_deterministic_gradients_are_the_same():
    groups, leaves, _ = regions((0.25, 0.5, 0.25), 37, 8, torch.float32)
    before = gradients(functions.aggregate(leaves[0], groups, leaves[1:4], leaves[4:]), leaves)
    torch.use_deterministic_algorithms(True)
    try:
        after = gradients(functions.aggregate(leaves[0], groups, leaves[1:4], leaves[4:]), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


def test_most_similar():
    x, seeds = torch.randn(2, 70, 40), torch.randn(2, 37, 40)
    expected = (x.double() @ seeds.double().transpose(1, 2)).argmax(-1)
    assert torch.equal(functions.most_similar(x, seeds), expected)
    assert not functions.most_similar(torch.ones(1, 3, 4), torch.ones(1, 40, 4)).any()  # the first of equal ones


# -- networks -----------------------------------------------------------------------------------------------------


def small(**options):
    """Three stages of tokens, at odd sizes; grids of 9 x 8, 5 x 4, 3 x 2 at 36 x 32 pixels."""
    stages = (
        StageConfig(16, 2, 2, 4, (Region(0.25, 28), Region(0.5, 7), Region(0.25, 3))),
        StageConfig(32, 2, 2, 2, (Region(0.5, 4), Region(0.5, 2)), **options.pop("second", {})),
        StageConfig(32, 2, 2, 2, (Region(0.5, 2), Region(0.5, 1))),
        StageConfig(32, 2, 1),
    )
    model = sgformer.create_model(SGFormerConfig(stages, num_classes=5, img_size=(36, 32), **options))
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention is not the same everywhere
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, torch.randn(1, 3, 36, 32)


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel's function was called."""
    seen = {}

    def counted(name, run):
        def count(*args):
            seen[name] = seen.get(name, 0) + 1
            return run(*args)

        return count

    for name in ("attention_and_received", "aggregate", "most_similar"):
        monkeypatch.setattr(functions, name, counted(name, getattr(functions, name)))
    return seen


def step(model, image):
    model.zero_grad()
    logits = model(image)
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options", [{}, {"aggregation": "mean", "second": {"scales": (2, 1)}}], ids=["paper", "others"]
)
def test_a_network_trains_the_same(options, calls):
    model, image = small(**options)
    keys = list(model.state_dict())
    expected, slow = step(model, image)
    hooked = []
    model.stages[0].blocks[0].attn.proj_in.register_forward_hook(lambda *_: hooked.append(1))
    assert sgformer.accelerate(model, triton=True) is model and list(model.state_dict()) == keys
    logits, fast = step(model, image)
    assert calls == {"attention_and_received": 6, "aggregate": 3} and hooked
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in slow.items():
        assert (fast[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
    from sgformer.backends.native_autograd import restore

    restore(model)
    assert not {type(m) for m in model.modules()} & set(modules.EAGER)


def test_changed_sums_of_a_region_are_called(calls):
    model, image = small()
    expected, seen = model.eval()(image), []
    model.stages[0].blocks[1].attn.aggregate[2].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        logits = sgformer.accelerate(model, triton=True)(image)
    assert seen and calls == {"attention_and_received": 6, "aggregate": 2}
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_optimize_infers_the_same_and_leaves_the_original(calls):
    model, image = small(aggregation="merge", coarse="window")
    fast, plain = sgformer.optimize(model, triton=True), copy.deepcopy(model).eval()
    assert not {type(m) for m in model.modules()} & set(modules.EAGER)
    with torch.no_grad():
        seen, expected = fast.inspect(image), plain.inspect(image)
    assert calls == {"attention_and_received": 6, "most_similar": 3 + 2 + 2}
    torch.testing.assert_close(seen.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for key, significance in expected.significance.items():
        torch.testing.assert_close(seen.significance[key], significance, rtol=1e-4, atol=1e-6)


def test_outside_of_their_network_and_for_what_they_do_not_serve_torch_runs(calls):
    model, image = small()
    sgformer.accelerate(model, triton=True)
    q = torch.randn(1, 1, 4, 4)
    ops.attention_and_received(q, q, q)
    model.double()(image.double())  # no kernels for float64
    model.float()
    torch.func.functional_call(model, {}, image)
    seen = dict(calls)
    assert seen == {"attention_and_received": 6, "aggregate": 3}
    torch.func.vjp(lambda x: model(x), image)
    torch.jit.trace(model.eval(), image, check_trace=False)
    with torch.device("meta"):
        copy.deepcopy(model).to("meta")(torch.empty(1, 3, 36, 32))
    assert calls == seen
    with kernels.using(functions):
        wide = torch.randn(1, 1, 2, 2 * functions.WIDEST_HEAD)
        ops.attention_and_received(wide, wide, wide)
        assert calls == seen
        ops.attention_and_received(q, q, q)
    assert calls != seen


def test_autocast_gives_the_dtypes_of_torch():
    model, image = small()
    dtypes = []
    for block in model.stages[0].blocks:
        block.attn.proj.register_forward_hook(lambda m, args, out: dtypes.append((args[0].dtype, out.dtype)))
    model.stages[0].blocks[1].attn.kv.register_forward_hook(lambda m, args, out: dtypes.append(args[0].dtype))
    results = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results.append(model.inspect(image))
        sgformer.accelerate(model, triton=True)
    assert dtypes[: len(dtypes) // 2] == dtypes[len(dtypes) // 2 :]
    assert all(s.dtype == torch.float32 for s in results[1].significance.values())
    torch.testing.assert_close(results[1].significance["1.0"], results[0].significance["1.0"], rtol=0.05, atol=1e-3)
