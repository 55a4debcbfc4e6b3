"""Training with native kernels: the gradients of torch, and a network that stays what it was."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
from changed_networks import CHANGES
from torch.utils.flop_counter import FlopCounterMode

import sgformer
from sgformer.backends import native, native_autograd
from sgformer.models.backbone import GuidedBlock, HybridBlock

try:
    native.library()
except native.UnavailableError as error:
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)


def pair(name="sgformer_n", **options):
    """A network, and a copy that is accelerated; by default with an order of tokens that no rounding changes."""
    model = sgformer.create_model(
        name, **{"num_classes": 5, "drop_path_rate": 0.0, "significance": "random", **options}
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.train(), sgformer.accelerate(copy.deepcopy(model)).train()


def gradients(model, x):
    out = model(x)
    model.zero_grad()
    x.grad = None
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}, x.grad


def assert_close(got, expected, tolerance, floor=1e-7):
    assert (got - expected).norm() <= tolerance * expected.norm() + floor


def assert_same(a, b, x, tolerance=2e-5):
    (out_a, grads_a, x_a), (out_b, grads_b, x_b) = gradients(a, x), gradients(b, x)
    assert_close(out_b, out_a, tolerance)
    assert grads_a.keys() == grads_b.keys()
    # A bias's gradient may be a sum that nearly cancels; what is left of it rounds as the whole gradient does.
    floor = 1e-7 + 1e-8 * torch.stack([g.norm() for g in grads_a.values() if g is not None]).norm()
    for name, gradient in grads_a.items():
        assert (gradient is None) == (grads_b[name] is None), name
        if gradient is not None:
            assert_close(grads_b[name], gradient, tolerance, floor)
    if x_a is not None:
        assert_close(x_b, x_a, tolerance)


@pytest.mark.parametrize(
    "size, options",
    [
        ((64, 64), {}),
        ((65, 131), {}),  # windows, reductions and regions that do not divide the grid
        ((96, 80), {"coarse": "window"}),
        ((96, 64), {"significance": "learned"}),  # torch's attention stays, and gates
        ((64, 64), {"aggregation": "mean"}),
        ((64, 96), {"attention": "linear"}),
        ((32, 32), {"pairs": "hybrid", "significance": "hybrid"}),
    ],
)
def test_gradients_are_those_of_torch(size, options):
    a, b = pair(**options)
    assert_same(a, b, torch.randn(2, 3, *size, requires_grad=True))


def test_an_image_at_a_time(monkeypatch):
    monkeypatch.setattr(native, "CHUNK", 1)
    a, b = pair()
    assert_same(a, b, torch.randn(3, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgformer_t", "sgformer_s"])
def test_gradients_of_larger_ones(name):
    a, b = pair(name)
    assert_same(a, b, torch.randn(3, 3, 96, 64), 1e-4)


@pytest.mark.parametrize("grid", [(14, 14), (9, 20), (3, 2)])
@pytest.mark.parametrize("coarse", ["global", "window"])
def test_blocks(grid, coarse):
    """Every kind of block of every stage against itself in float64."""
    model, fast = pair(coarse=coarse, significance="hybrid")
    kinds = set()
    for before, after in zip(model.double().stages, fast.stages, strict=True):
        x, maps = torch.randn(2, *grid, before.norm.normalized_shape[0]), ()
        weight = torch.randn_like(x)
        for block, fast_block in zip(before.blocks, after.blocks, strict=True):
            kinds.add(type(fast_block).__name__)
            x, y = x.detach().requires_grad_(), x.detach().double().requires_grad_()
            given = tuple(t.detach() for t in maps) if isinstance(block, GuidedBlock) else ()  # sorted by the same
            got, expected = fast_block(x, *(t.float() for t in given)), block(y, *(t.float() for t in given))
            if isinstance(block, HybridBlock):
                maps = expected[1:]
                for a, b in zip(got[1:], maps, strict=True):
                    assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-8) and not a.requires_grad
            got, expected = (t[0] if isinstance(t, tuple) else t for t in (got, expected))
            assert_close(got, expected, 1e-5)
            (got * weight).sum().backward()
            (expected * weight).sum().backward()
            assert_close(x.grad, y.grad, 1e-5)
            for p, q in zip(fast_block.parameters(), block.parameters(), strict=True):
                assert_close(p.grad, q.grad, 1e-4)
    assert kinds == {"FastHybrid", "FastGuided", "FastPlain"}


def test_it_stays_what_it_was(tmp_path):
    a, b = pair()
    assert {n: v.shape for n, v in a.state_dict().items()} == {n: v.shape for n, v in b.state_dict().items()}
    assert [n for n, _ in a.named_modules()] == [n for n, _ in b.named_modules()]
    x = torch.randn(2, 3, 64, 64)
    sgformer.save_model(b, tmp_path / "b.safetensors")
    with torch.no_grad():
        a, b = a.eval(), b.eval()
        expected = a(x)
        for other in (b, copy.deepcopy(b), sgformer.accelerate(b), sgformer.load_model(tmp_path / "b.safetensors")):
            assert torch.allclose(other(x), expected, atol=1e-5)
        for native_or_not in (None, False):
            fast, usual = (sgformer.optimize(m, native=native_or_not) for m in (b, a))
            assert [type(m) for m in fast.modules()] == [type(m) for m in usual.modules()]
            assert torch.equal(fast(x), usual(x))
        seen, wanted = b.inspect(x), a.inspect(x)
        for name, groups in wanted.tokens.items():
            assert torch.equal(seen.tokens[name].token_map(), groups.token_map())
        for name, significance in wanted.coarse.items():
            assert torch.allclose(seen.coarse[name], significance, rtol=1e-4)


def test_checkpointing_and_stochastic_depth():
    a, b = pair(drop_path_rate=0.5)
    x = torch.randn(4, 3, 64, 64)
    torch.manual_seed(1)
    kept = gradients(b, x)
    b.set_grad_checkpointing()
    torch.manual_seed(1)
    again = gradients(b, x)
    torch.manual_seed(1)
    expected = gradients(a, x)
    for name, gradient in expected[1].items():
        assert_close(kept[1][name], gradient, 2e-5)
        assert_close(again[1][name], kept[1][name], 1e-6)


@pytest.mark.parametrize("images, rate", [(1, 0.5), (3, 0.3), (2, 0.99)])
def test_images_that_stochastic_depth_drops_need_no_computing(images, rate):
    """Nothing differs but the time: not even where it drops all of a batch, and gradients are zeros, not None."""
    a, b = pair(drop_path_rate=rate)
    for seed in range(3):
        found = []
        for model in (a, b):
            torch.manual_seed(seed)
            x = torch.randn(images, 3, 64, 48, requires_grad=True)
            found.append((gradients(model, x), torch.rand(1)))
        ((out_a, grads_a, x_a), drawn_a), ((out_b, grads_b, x_b), drawn_b) = found
        assert drawn_a == drawn_b  # as many random numbers
        assert_close(out_b, out_a, 2e-5)
        assert_close(x_b, x_a, 2e-5)
        for name, gradient in grads_a.items():
            assert_close(grads_b[name], gradient, 2e-5)


def test_less_is_kept():
    a, b = pair("sgformer_t")

    def kept(model):
        storages = {}

        def keep(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(torch.randn(2, 3, 224, 224))
        weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
        return out, sum(storages.values()) - weights

    (_, of_torch), (_, of_ours) = kept(a), kept(b)
    assert of_ours < 0.6 * of_torch


@pytest.mark.slow
def test_where_kernels_do_not_serve_torch_does():
    a, b = pair()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(b.double()(x.double()), a.double()(x.double()))
        a, b = a.float(), b.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(b(x), a(x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of the size, which is fixed
            traced = torch.jit.trace(b, x)
        assert torch.allclose(traced(x.flip(3)), a(x.flip(3)), atol=1e-5)
    got, expected = (torch.func.grad(lambda x, m=m: m(x).square().sum())(x) for m in (b, a))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("path", ["attn.proj_in", "mlp.fc1", "norm2"])
def test_who_looks_into_a_block_is_called(path):
    a, b = pair()
    x, called = torch.randn(1, 3, 64, 64), []
    hook = b.stages[1].blocks[0].get_submodule(path).register_forward_hook(lambda *_: called.append(1))
    assert_same(a, b, x)
    hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    try:
        a(x)
        of_torch = len(called)
        b(x)
    finally:
        hook.remove()
    assert len(called) == 2 * of_torch - 1 and called[0] == 1
    with FlopCounterMode(display=False) as count_a:
        a(x)
    with FlopCounterMode(display=False) as count_b:
        b(x)
    assert count_b.get_total_flops() == count_a.get_total_flops() > 0


@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_were_changed_afterwards_are_as_they_are(change):
    a, b = pair()
    x = torch.randn(1, 3, 64, 64)
    before = a(x).detach()
    for model in (a, b):
        torch.manual_seed(1)
        CHANGES[change](model)
    assert_same(a, b, x)
    assert not torch.equal(a(x), before)


@pytest.mark.parametrize(
    "path", ["stem.conv1.norm", "stages.0.blocks.0.attn.local", "stages.0.blocks.1.attn.aggregate"]
)
def test_parameters_that_kernels_cannot_read_go_to_torch(path):
    a, b = pair()
    x = torch.randn(1, 3, 64, 64)
    for model in (a, b):
        model.get_submodule(path).double()
        try:
            model(x)
        except RuntimeError as error:
            said = str(error)
        else:
            said = "no error"
        if model is a:
            expected = said
    assert said == expected
    a, b = pair()
    weight = b.stages[0].blocks[0].attn.proj_in.weight
    weight.data = weight.data.t().contiguous().t()
    assert_same(a, b, x)


def test_what_backward_reads_is_guarded():
    _, b = pair()
    block, x = b.stages[0].blocks[1], torch.randn(1, 16, 16, 32)
    out, _, groups = block(x.requires_grad_(), *torch.rand(2, 1, 16, 16))
    groups[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_loaded_where_there_is_no_compiler(tmp_path, monkeypatch):
    a, b = pair()
    torch.save(b, tmp_path / "whole.pt")
    monkeypatch.setattr(native_autograd, "_available", lambda: False)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), a(x))


def test_what_is_no_network_of_ours_is_refused():
    with pytest.raises(ValueError, match="networks of sgformer"):
        sgformer.accelerate(nn.Linear(2, 2))


def test_frozen_parts_get_no_gradient():
    a, b = pair()
    for model in (a, b):
        model.stem.requires_grad_(False)
        model.stages[0].requires_grad_(False)
        model.stages[1].blocks[1].attn.proj_in.requires_grad_(False)
    x = torch.randn(2, 3, 64, 64)
    assert_same(a, b, x)
    assert a.stem.conv1.conv.weight.grad is None and a.stages[1].blocks[1].attn.proj.weight.grad is not None


def test_the_same_bits_again():
    _, b = pair()
    x = torch.randn(3, 3, 96, 64)
    first, second = (gradients(b, x)[1] for _ in range(2))
    assert all(torch.equal(second[name], gradient) for name, gradient in first.items())


def test_gradients_of_gradients_are_refused():
    _, b = pair()
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    (g,) = torch.autograd.grad(b(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_a_network_within_another():
    pytest.importorskip("lightning")
    from sgformer.models.pyramid import pyramid_backbone

    a = pyramid_backbone("sgformer_n")
    b = copy.deepcopy(a)
    assert sgformer.accelerate(b) is b
    x = torch.randn(1, 3, 96, 64)
    for model in (a, b):
        sum(m.square().mean() for m in model(x)).backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        if "aggregate" not in name:  # an order that hangs on rounding
            assert (q.grad - p.grad).norm() <= 1e-2 * p.grad.norm() + 1e-5


def test_no_image_at_all():
    _, b = pair()
    b.stages[0](torch.randn(0, 16, 16, 32).permute(0, 3, 1, 2)).sum().backward()
