import pytest
import torch

import sgformer
from sgformer.core.errors import UserError
from sgformer.models.load import read_weights, save_weights
from sgformer.models.pyramid import Pyramid, pyramid_backbone
from sgformer.tasks.segment.network import Segmenter
from sgformer.training.task_module import decay_groups


@pytest.mark.parametrize(
    "name", ["sgformer_n", "pvt_v2_b0", "resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224"]
)
def test_any_hierarchical_network_gives_four_maps(name):
    backbone = pyramid_backbone(name).eval()
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == list(backbone.channels)
    assert [tuple(m.shape[-2:]) for m in maps] == [(64 // s, 96 // s) for s in backbone.strides]
    assert backbone.strides == (4, 8, 16, 32)


def test_every_parameter_gets_a_gradient():
    backbone = pyramid_backbone("sgformer_n")
    sum(m.square().mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("vit_tiny_patch16_224", "one map at each of the strides"), ("sgformer_x", "did you mean sgformer_")],
)
def test_other_networks_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        pyramid_backbone(name)


@pytest.mark.parametrize(("stages", "frozen"), [(-1, ()), (0, ("stem",)), (2, ("stem", "stages.0", "stages.1"))])
def test_freezing_keeps_weights_and_statistics_of_the_first_stages(stages, frozen):
    backbone = pyramid_backbone("sgformer_n", freeze_stages=stages, drop_path=0.5)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    sum(m.square().mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    prefixes = tuple(f"network.{part}." for part in frozen)
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes) if frozen else parameter.requires_grad
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith(prefixes) for name in moved if frozen)
    assert all(not m.training for name, m in backbone.named_modules() if f"{name}.".startswith(prefixes) and frozen)


def test_frozen_batch_norms_keep_their_statistics():
    backbone = pyramid_backbone("resnet10t", freeze_stages=1)
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    moved = {name.split(".")[1] for name, value in backbone.named_buffers() if not torch.equal(value, before[name])}
    assert moved == {"layer2", "layer3", "layer4"}


def test_backbone_weights_come_from_classification(tmp_path):
    model = sgformer.create_model("sgformer_n", num_classes=5)
    sgformer.save_model(model, tmp_path / "w.safetensors", {"model": "sgformer_n", "task": "classify"})
    backbone = pyramid_backbone("sgformer_n", weights=tmp_path / "w.safetensors", drop_path=0.2)
    held = model.state_dict()
    mine = backbone.network.state_dict()
    assert set(mine) == {name for name in held if not name.startswith("head.fc")}
    assert all(torch.equal(value, held[name]) for name, value in mine.items())
    assert backbone.network.config.drop_path_rate == 0.2
    with pytest.raises(UserError, match="holds sgformer_n, not --model sgformer_t"):
        pyramid_backbone("sgformer_t", weights=tmp_path / "w.safetensors")


def test_an_architecture_rebuilds_its_network():
    backbone = pyramid_backbone("sgformer_n", coarse="window").eval()
    again = pyramid_backbone(backbone.architecture).eval()
    again.load_state_dict(backbone.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert again.architecture == backbone.architecture
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), again(x), strict=True))


def test_norms_and_position_table_do_not_decay():
    backbone = pyramid_backbone("sgformer_n", freeze_stages=0)
    decayed, kept = decay_groups(backbone, 0.05)
    names = {id(p): name for name, p in backbone.named_parameters()}
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert {names[id(p)] for p in [*decayed["params"], *kept["params"]]} == trained
    assert all("norm" in names[id(p)] for p in kept["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert backbone.no_weight_decay() == {"network.stem.position.table"}
    free = pyramid_backbone("sgformer_n")
    kept = {id(p) for p in decay_groups(free, 0.05)[1]["params"]}
    assert id(free.network.stem.position.table) in kept


def test_dense_files_name_their_task_and_give_their_backbone(tmp_path):
    network = Segmenter(pyramid_backbone("sgformer_n"), "semantic-fpn", 3, 8)
    path = tmp_path / "w.safetensors"
    save_weights(network, path, {"task": "segment", "classes": ["a", "b", "c"]})
    held = read_weights(path)
    assert held.task == "segment" and held.architecture == network.architecture and held.model == "sgformer_n"
    assert all(torch.equal(held.tensors[name], tensor) for name, tensor in network.state_dict().items())
    with pytest.raises(UserError, match="holds sgformer_n, not --model sgformer_t"):
        read_weights(path, "sgformer_t")
    backbone = pyramid_backbone("sgformer_n", weights=path).network.state_dict()
    assert all(torch.equal(tensor, backbone[name]) for name, tensor in network.backbone.network.state_dict().items())
    sgformer.save_model(sgformer.create_model("sgformer_n"), path)
    assert read_weights(path).architecture is None and read_weights(path).task == "classify"
    assert isinstance(pyramid_backbone("sgformer_n", weights=path), Pyramid)


@pytest.mark.parametrize("size", [(37, 50), (64, 96), (70, 133)])
def test_networks_of_whole_patches_see_a_padded_image(size):
    """timm's Swin refuses other sizes; what is cut off belongs to the padding alone."""
    backbone = pyramid_backbone("swin_tiny_patch4_window7_224").eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps = backbone(image)
        padded = torch.zeros(1, 3, -(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
        padded[..., : size[0], : size[1]] = image
        expected = backbone(padded)
    assert [tuple(m.shape[-2:]) for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in backbone.strides]
    for found, whole in zip(maps, expected, strict=True):
        assert torch.equal(found, whole[..., : found.shape[-2], : found.shape[-1]])


def test_networks_that_need_no_padding_get_none():
    assert not pyramid_backbone("resnet10t").pads and not pyramid_backbone("sgformer_n").pads


@pytest.mark.parametrize("name", ["hiera_tiny_224", "maxvit_rmlp_pico_rw_256"])
def test_networks_of_one_size_say_so(name):
    with pytest.raises(UserError, match=rf"^{name} does not take images of any size \(.*\); pick another"):
        pyramid_backbone(name)
