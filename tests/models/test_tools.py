"""Tools that change a network by the types of its layers, and load or adapt weights when a layer is called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_backbone import lively, small
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torchvision.models.feature_extraction import create_feature_extractor

import sgformer
from sgformer.models.config import AGGREGATION, with_stages
from sgformer.models.pyramid import pyramid_backbone
from sgformer.sequence import SelfGuidedAttention1d
from sgformer.tasks.detect.network import Detector
from sgformer.tasks.segment.network import Segmenter

SCALES = ((8, 1), (4, 1), (4, 2, 2, 1))
NETWORKS = {
    "classifier": lambda: (small(), torch.randn(2, 3, 75, 64)),
    "scales": lambda: (sgformer.create_model(with_stages(small().config, scales=SCALES)), torch.randn(2, 3, 75, 64)),
    **{name: lambda name=name: (small(aggregation=name), torch.randn(2, 3, 75, 64)) for name in AGGREGATION},
    "learned": lambda: (small(significance="learned"), torch.randn(2, 3, 75, 64)),
    "hybrid": lambda: (small(pairs="hybrid"), torch.randn(2, 3, 75, 64)),
    "sequence": lambda: (SelfGuidedAttention1d(16, 4), torch.randn(2, 40, 16)),
    "semantic-fpn": lambda: (Segmenter(pyramid_backbone(small()), "semantic-fpn", 3, 16), torch.randn(1, 3, 64, 96)),
    "upernet": lambda: (Segmenter(pyramid_backbone(small()), "upernet", 3, 16).train(), torch.randn(2, 3, 64, 96)),
    "detector": lambda: (Detector(pyramid_backbone(small()), num_classes=2, width=16), [torch.rand(3, 64, 96)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_layer_with_weights_is_called_and_computes_what_its_type_says(name):
    """Nothing reads the weights of a layer from outside it, and torch's layers are used as torch's."""
    model, x = NETWORKS[name]()
    if name == "detector":
        model.eval()
    called = set()

    def check(layer, args, out):
        called.add(layer)
        torchs = {nn.Linear: F.linear, nn.Conv2d: layer._conv_forward if isinstance(layer, nn.Conv2d) else None}
        for kind, function in torchs.items():
            if isinstance(layer, kind):
                assert type(layer).forward is kind.forward
                with torch.no_grad():
                    torch.testing.assert_close(out, function(args[0], layer.weight, layer.bias))

    owners = {layer for layer in model.modules() if any(p is not None for p in layer._parameters.values())}
    for layer in owners:
        layer.register_forward_hook(check)
    model(x)
    names = {layer: path for path, layer in model.named_modules()}
    unused = {names[layer] for layer in owners - called}
    # A detector without objects, as here in half of the draws, does not call the mask head.
    assert not {path for path in unused if "mask" not in path}


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def test_weights_that_are_there_only_while_a_layer_runs():
    """As with the offloading of accelerate and diffusers."""
    model, x = lively(small()), torch.randn(2, 3, 75, 64)
    with torch.no_grad():
        expected, kept = model(x), {}
        for layer in model.modules():
            kept[layer] = {name: p for name, p in layer._parameters.items() if p is not None}

            def away(layer, *_):
                for name, p in kept[layer].items():
                    layer._parameters[name] = nn.Parameter(torch.empty_like(p, device="meta"))

            away(layer)
            layer.register_forward_pre_hook(lambda layer, _: layer._parameters.update(kept[layer]))
            layer.register_forward_hook(away)
        assert torch.equal(model(x), expected)


def test_every_linear_layer_in_eight_bits():
    model, x = lively(small()), torch.randn(2, 3, 75, 64)
    smaller = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(layer) is nn.Linear for layer in smaller.modules())
    with torch.no_grad():
        expected = model(x)
        assert (smaller(x) - expected).abs().max() < 0.1 * expected.abs().max()


def test_pruned_layers_train():
    model, x = lively(small()).train(), torch.randn(2, 3, 75, 64)
    parts = [(layer, "weight") for layer in layers(model)]
    prune.global_unstructured(parts, pruning_method=prune.L1Unstructured, amount=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):  # masks are applied anew at every call
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    with torch.no_grad():
        masked = model(x)
        for part in parts:
            prune.remove(*part)
        assert torch.equal(model(x), masked)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers(model))
    assert zeros == round(0.3 * sum(layer.weight.numel() for layer in layers(model)))


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm, parametrizations.weight_norm])
def test_normalised_weights_train(norm):
    model = small().train()
    for layer in layers(model):
        norm(layer)
    for _ in range(2):
        model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Adapted(nn.Module):
    """A low-rank term beside a linear layer, added to its weight in the end; what peft puts in place of each."""

    def __init__(self, layer):
        super().__init__()
        self.layer, rank = layer.requires_grad_(False), 2
        self.down = nn.Parameter(torch.randn(rank, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, rank) * 0.1)

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T

    def merged(self):
        with torch.no_grad():
            self.layer.weight += self.up @ self.down
        return self.layer


def test_adapters_on_all_linear_layers_learn_and_merge():
    model, x = lively(small()), torch.randn(2, 3, 75, 64)
    places = [(m, n, c) for m in model.modules() for n, c in m.named_children() if isinstance(c, nn.Linear)]
    for module, name, layer in places:
        setattr(module, name, Adapted(layer))
    out = model(x)
    out.square().sum().backward()
    adapted = [module for module in model.modules() if isinstance(module, Adapted)]
    assert len(adapted) == len(places) and all(a.up.grad.abs().sum() > 0 for a in adapted)
    for module, name, _ in places:
        setattr(module, name, getattr(module, name).merged())
    with torch.no_grad():
        torch.testing.assert_close(model(x), out.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["fc"], init_lora_weights=False)
    model, x = peft.get_peft_model(lively(small()), config), torch.randn(2, 3, 75, 64)
    out = model(x)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(x), out.detach(), rtol=1e-4, atol=1e-4)


def test_names_and_shapes_of_weights_are_those_of_released_files():
    state = small().state_dict()
    pooled = {name: tuple(t.shape) for name, t in state.items() if name.startswith("stages.0.blocks.1.attn.aggregate")}
    sizes = (196, 56, 28)
    expected = {f"{i}.weight": (1, r) for i, r in enumerate(sizes)} | {f"{i}.bias": (1,) for i in range(3)}
    assert pooled == {f"stages.0.blocks.1.attn.aggregate.{name}": shape for name, shape in expected.items()}
    assert state["stages.0.blocks.0.mlp.conv.weight"].shape == (32, 1, 3, 3)
    assert state["stages.0.blocks.0.attn.local.weight"].shape == (8, 1, 3, 3)


# -- transformations and exporters of torch ---------------------------------------------------------------------------


def test_vmap_and_gradients_of_each_image():
    model, x, target = lively(small()), torch.randn(3, 3, 75, 64), torch.tensor([0, 3, 1])
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x, target):
        return F.cross_entropy(torch.func.functional_call(model, weights, (x[None],)), target[None])

    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(x[:, None])[:, 0], model(x))
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, target)
    F.cross_entropy(model(x), target, reduction="sum").backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-3, atol=1e-4)


def test_second_and_forward_derivatives():
    """torch's fused attention on a CPU has neither, its plain one has."""
    model, x = lively(small()), torch.randn(1, 3, 64, 64)
    weight = model.stages[0].blocks[0].mlp.fc1.weight
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(model, (x,), (torch.ones_like(x),))
        (gradient,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    expected = torch.autograd.functional.jacobian(model, x).sum((2, 3, 4, 5))
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert second.isfinite().all() and second.any()


@pytest.mark.parametrize(
    "options",
    [
        *({"aggregation": name} for name in AGGREGATION),
        *({"significance": name} for name in ("uniform", "random", "feature-norm", "learned")),
        {"pairs": "hybrid"},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_torchvision_extracts_features(options):
    """Its tracer knows no sizes, and takes them from the image at every call."""
    model = lively(small(**options))
    nodes = [*(f"stages.{i}" for i in range(4)), "head.fc"]
    extract = create_feature_extractor(model, nodes)
    with torch.no_grad():
        for size in ((75, 64), (64, 96)):
            x = torch.randn(2, 3, *size)
            found, maps = extract(x), model.forward_intermediates(x, intermediates_only=True)
            assert all(torch.equal(found[node], m) for node, m in zip(nodes, [*maps, model(x)], strict=True))


@pytest.mark.slow
def test_the_network_itself_as_onnx_fails_at_other_sizes(tmp_path):
    """Rather than giving other numbers; `sgformer export` writes files for any size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = lively(small()), tmp_path / "bare.onnx"
    axes = {"image": {0: "n", 2: "height", 3: "width"}}
    example = (torch.randn(2, 3, 96, 64),)
    torch.onnx.export(model, example, str(path), dynamo=False, input_names=["image"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": torch.randn(1, 3, 96, 64).numpy()})[0].shape == (1, 5)
    for size in ((96, 128), (64, 96), (128, 160), (192, 128)):
        with pytest.raises(Exception, match="Add"):
            session.run(None, {"image": torch.randn(2, 3, *size).numpy()})


@pytest.mark.slow
def test_timms_onnx_export(tmp_path):
    pytest.importorskip("onnxruntime")
    from timm.utils.onnx import onnx_export

    path = tmp_path / "timm.onnx"
    onnx_export(small(), str(path), batch_size=2, input_size=(3, 64, 64), check=True, check_forward=True)
    assert path.stat().st_size > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"significance": "learned"}, marks=pytest.mark.slow),
        pytest.param({"aggregation": "merge"}, marks=pytest.mark.slow),
        pytest.param({"pairs": "hybrid"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options.values()) or "published",
)
@pytest.mark.parametrize("way", ["plain", pytest.param("checkpointing", marks=pytest.mark.slow), "accelerated"])
def test_a_training_step_is_one_graph_with_the_same_gradients(options, way):
    dtype, tolerance = torch.float64, 1e-9
    model = small(**options).train()
    if way == "checkpointing":
        model.set_grad_checkpointing()
    if way == "accelerated":  # its kernels, of float32, give way to what torch can see
        sgformer.accelerate(model)
        dtype, tolerance = torch.float32, 1e-3
    model.to(dtype)
    images = torch.randn(2, 3, 75, 64, dtype=dtype)

    def step(network):
        model.zero_grad()
        loss = network(images).square().sum()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    loss, expected = step(model)
    torch.compiler.reset()
    compiled_loss, gradients = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled_loss, loss, rtol=tolerance, atol=0)
    whole = max(wanted.abs().max() for wanted in expected)
    for made, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=tolerance, atol=float(tolerance * whole))
