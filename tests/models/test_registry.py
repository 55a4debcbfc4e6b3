"""The contract that timm and its users rely on."""

import pytest
import timm
import torch
from timm.models import create_model, list_models, load_checkpoint
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import create_feature_extractor
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2

import sgformer

NAMES = ["sgformer_n", "sgformer_t", "sgformer_s", "sgformer_m", "sgformer_b"]
REDUCTIONS = [4, 8, 16, 32]


@pytest.fixture(scope="module")
def nano():
    return create_model("sgformer_n", num_classes=7).eval()


def test_registered():
    assert sorted(list_models("sgformer*")) == sorted(NAMES)
    cfg = timm.get_pretrained_cfg("sgformer_s")
    assert cfg.mean == (0.485, 0.456, 0.406) and cfg.crop_pct == 0.9 and cfg.interpolation == "bicubic"


@pytest.mark.parametrize("name", NAMES)
def test_attributes(name):
    model = create_model(name, device="meta", num_classes=11)
    assert model.num_classes == 11 and model.in_chans == 3 and model.global_pool == "avg"
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features
    info = model.feature_info
    assert [i["reduction"] for i in info] == REDUCTIONS
    assert [i["module"] for i in info] == [f"stages.{s}" for s in range(4)]
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    cfg = model.default_cfg
    assert cfg["classifier"] in modules and cfg["first_conv"] in modules
    assert cfg["classifier"] + ".weight" in parameters and model.no_weight_decay() <= set(parameters)


@pytest.mark.parametrize("size", [96, 128, 224])
def test_forward_and_backward(size):
    model = create_model("sgformer_n", num_classes=7).train()
    model(torch.randn(2, 3, size, size)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("num_classes", [0, 42])
def test_classifier_can_be_taken_off_and_replaced(num_classes):
    model = create_model("sgformer_n").eval()
    x = torch.randn(1, 3, 64, 64)
    model.reset_classifier(num_classes)
    with torch.no_grad():
        assert model(x).shape == (1, num_classes or model.num_features)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, model.num_features)
    assert model.config.num_classes == num_classes
    model.reset_classifier(0, "")
    with torch.no_grad():
        assert model(x).shape == (1, model.num_features, 2, 2)
        pooled = create_model("sgformer_n", num_classes=0, global_pool="").eval()(x)
    assert pooled.shape == (1, model.num_features, 2, 2)


def test_a_new_classifier_keeps_dtype_and_starts_small():
    model = create_model("sgformer_n", dtype=torch.bfloat16)
    assert max(p.abs().max() for n, p in model.named_parameters() if ".fc" in n or ".proj" in n) < 0.2
    model.reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert model.get_classifier().weight.abs().max() < 0.1 and model.get_classifier().bias.abs().max() == 0


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,)])
def test_features_only(out_indices):
    full = create_model("sgformer_n").eval()
    model = create_model("sgformer_n", features_only=True, out_indices=out_indices).eval()
    assert isinstance(model, FeatureGetterNet)
    missing = model.load_state_dict({f"model.{k}": v for k, v in full.state_dict().items()}, strict=False)
    assert not missing.missing_keys
    assert model.feature_info.reduction() == [REDUCTIONS[i] for i in out_indices]
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        maps, expected = model(x), full.forward_intermediates(x, intermediates_only=True)
    for features, i, channels in zip(maps, out_indices, model.feature_info.channels(), strict=True):
        assert features.shape[1] == channels and torch.equal(features, expected[i])
    assert maps[-1].shape[-1] == 128 // REDUCTIONS[out_indices[-1]]


@pytest.mark.parametrize("kind", ["hook", "fx", "dict", "list"])
def test_every_way_of_timm_to_take_features_is_nchw(kind, nano):
    model = create_model("sgformer_n", features_only=True, feature_cls=kind, out_indices=(1, 3)).eval()
    given = nano.state_dict()
    own = {name: name.removeprefix("graph_module.").replace("stages_", "stages.") for name in model.state_dict()}
    model.load_state_dict({name: given[theirs] for name, theirs in own.items()})
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, expected = model(x), nano.forward_intermediates(x, [1, 3], intermediates_only=True)
    found = list(found.values()) if isinstance(found, dict) else found
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True, True]
    assert getattr(model, "output_fmt", "NCHW") == "NCHW"


def test_stages_have_no_dilation():
    assert create_model("sgformer_n", features_only=True, output_stride=32, device="meta")
    with pytest.raises(ValueError, match="output_stride must be 32"):
        create_model("sgformer_n", features_only=True, output_stride=16)


def test_forward_intermediates(nano):
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        final, maps = nano.forward_intermediates(x)
        assert torch.equal(final, nano.forward_features(x)) and torch.equal(final, maps[-1]) and len(maps) == 4
        last_two = nano.forward_intermediates(x, indices=2, intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(last_two, maps[2:], strict=True)] == [True, True]
        channels_last = nano.forward_intermediates(x, [-4], output_fmt="NHWC", intermediates_only=True)
        assert torch.equal(channels_last[0].permute(0, 3, 1, 2), maps[0])
        early, one = nano.forward_intermediates(x, [1], stop_early=True)
        assert torch.equal(early, maps[1]) and torch.equal(one[0], maps[1])
    with pytest.raises(ValueError, match="4"):
        nano.forward_intermediates(x, [4])
    with pytest.raises(ValueError, match="NLC"):
        nano.forward_intermediates(x, output_fmt="NLC")


def test_prune_intermediate_layers():
    model, x = create_model("sgformer_n").eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.forward_intermediates(x, [1], intermediates_only=True)
        assert model.prune_intermediate_layers([1]) == [1]
        after = model.forward_intermediates(x, [1], intermediates_only=True)
        assert torch.equal(before[0], after[0])
        assert torch.equal(model(x), after[0])
    assert not [n for n, _ in model.named_parameters() if n.startswith(("stages.2", "stages.3", "head"))]


def test_fx_feature_extraction_is_exactly_equal(nano):
    x = torch.randn(2, 3, 96, 96)
    nodes = [f"stages.{i}.norm" for i in range(4)] + ["head.fc"]
    traced = create_feature_extractor(nano, return_nodes=nodes)
    with torch.no_grad():
        out = traced(x)
        assert torch.equal(out["head.fc"], nano(x))
        for i, features in enumerate(nano.forward_intermediates(x, intermediates_only=True)):
            assert torch.equal(out[f"stages.{i}.norm"].permute(0, 3, 1, 2), features)


def test_fx_traced_backward():
    model = create_feature_extractor(create_model("sgformer_n").train(), {"head.fc": "y"})
    model(torch.randn(2, 3, 96, 96))["y"].mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layer_groups_run_from_input_to_output(nano):
    layers = group_parameters(nano, nano.group_matcher(), return_values=False, reverse=True)
    assert set(layers) == {name for name, _ in nano.named_parameters()}
    assert layers["stem.conv1.conv.weight"] == 0
    first = [layers[f"stages.{s}.blocks.0.norm1.weight"] for s in range(4)]
    assert first == sorted(first) and len(set(first)) == 4
    assert layers["stages.2.downsample.mix.conv.weight"] <= layers["stages.2.blocks.0.norm1.weight"]
    assert layers["head.fc.weight"] == max(layers.values())
    assert layers["stages.2.norm.weight"] <= layers["stages.3.blocks.0.norm1.weight"]


def test_optimizer_with_layer_decay_spares_norms_biases_and_the_position_table(nano):
    optimizer = create_optimizer_v2(nano, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.7)
    names = {id(p): n for n, p in nano.named_parameters()}
    scale = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            scale[name] = group["lr_scale"]
            decayed = parameter.ndim > 1 and not name.endswith(".bias") and name != "stem.position.table"
            assert (group["weight_decay"] > 0) == decayed, name
    assert scale["head.fc.weight"] == 1 and scale["stem.conv1.conv.weight"] == min(scale.values())


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_in_chans_img_size_and_dtype(channels):
    model = create_model("sgformer_n", in_chans=channels, img_size=96, dtype=torch.float64).eval()
    assert model.stem.position.table.shape[:2] == (24, 24)
    assert model(torch.randn(1, channels, 64, 96, dtype=torch.float64)).dtype == torch.float64


def test_meta_device_then_real_weights():
    model = create_model("sgformer_n", device="meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    fresh = create_model("sgformer_n")
    fresh.init_weights()
    torch.manual_seed(0)
    fresh.init_weights()
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_local_checkpoint_by_name(tmp_path):
    model = create_model("sgformer_n", num_classes=5).eval()
    sgformer.save_model(model, tmp_path / "w.safetensors")
    again = create_model("sgformer_n", num_classes=5, checkpoint_path=str(tmp_path / "w.safetensors")).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    load_checkpoint(again, str(tmp_path / "w.safetensors"))
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 5}
    larger = create_model("sgformer_n", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=9, img_size=320)
    assert larger.stem.position.table.shape[:2] == (80, 80)
    assert torch.equal(larger.stages[3].norm.weight, model.stages[3].norm.weight)


def test_forward_does_not_touch_the_input(nano):
    x = torch.randn(1, 3, 64, 64)
    kept = x.clone()
    with torch.no_grad():
        nano(x)
    assert torch.equal(x, kept)
