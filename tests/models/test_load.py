"""Weights in whatever form people have them: each is recognised, read once, and gives the same network."""

import argparse

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import sgformer
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.models.load import build_network, find_weights, read_weights
from sgformer.models.pyramid import pyramid_backbone
from sgformer.tasks.detect.network import Detector
from sgformer.tasks.segment.network import Segmenter

TIMM = "test_efficientnet_gn"  # a tiny network of timm's: 160 pixels, mean and deviation .5 in its pretrained_cfg


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = timm.create_model(TIMM, num_classes=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def of_timm(path, model, arch, **more):
    """A checkpoint as timm's train.py leaves it: other weights where averaged ones are the ones to take."""
    other = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    averaged = {f"module.{name}": t for name, t in model.state_dict().items()}
    held = {"state_dict": other, "state_dict_ema": averaged} if more.pop("ema", False) else {"state_dict": averaged}
    options = argparse.Namespace(lr=0.1, model=arch)
    torch.save({"epoch": 3, "arch": arch, **held, "optimizer": {}, "version": 2, "args": options, "metric": 0.5}, path)
    return path


def same(a, b, size=64):
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return torch.equal(a(x), b(x))


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("name", [TIMM, "sgformer_n"])
def test_a_checkpoint_of_timms_training(name, ema, tmp_path):
    model = timm.create_model(name, num_classes=5).eval()
    path = of_timm(tmp_path / "model_best.pth.tar", model, name, ema=ema)
    loaded = sgformer.load_model(path)
    assert same(loaded, model) and loaded.metadata["model"] == name and not loaded.training
    assert sgformer.load_model(path, num_classes=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(UserError, match=f"holds {name}, not --model resnet10t"):
        sgformer.load_model(path, model="resnet10t")


def test_a_plain_state_dict_needs_the_name_of_its_network(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.save(network.state_dict(), tmp_path / "w.pt")
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        with pytest.raises(UserError, match=r"not the network's name; pass --model"):
            sgformer.load_model(path)
        with pytest.raises(UserError, match="did you mean test_efficientnet_gn"):
            sgformer.load_model(path, model="test_eficientnet_gn")
        with pytest.raises(UserError, match="the weights do not fit the model"):
            sgformer.load_model(path, model="resnet10t")
        loaded = sgformer.load_model(path, model=TIMM)
        assert same(loaded, network) and loaded.num_classes == 7
        about = loaded.metadata  # as the network was trained, not as ImageNet's are
        assert about["mean"] == [0.5] * 3 and about["std"] == [0.5] * 3 and about["image_size"] == [160, 160]


def test_an_sgformer_state_dict_is_recognised_by_its_shapes(tmp_path):
    model = sgformer.create_model("sgformer_n", num_classes=4, img_size=96).eval()
    torch.save(model.state_dict(), tmp_path / "n.pt")
    loaded = sgformer.load_model(tmp_path / "n.pt")
    assert same(loaded, model, 96) and loaded.config.img_size == (96, 96) and loaded.metadata["model"] == "sgformer_n"


def test_a_path_that_exists_comes_before_a_name(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sgformer_n").mkdir()
    with pytest.raises(UserError, match=r"sgformer_n: holds no best\.safetensors"):
        find_weights("sgformer_n")
    model = sgformer.create_model("sgformer_n", num_classes=3)
    sgformer.save_model(model, tmp_path / "sgformer_n" / "last.safetensors", {"model": "sgformer_n"})
    assert sgformer.load_model("sgformer_n").config.num_classes == 3


@pytest.mark.parametrize("kind", [Segmenter, Detector])
def test_a_network_with_heads_gives_its_backbone_to_every_task(kind, tmp_path):
    for name in ("sgformer_n", "resnet10t"):
        torch.manual_seed(0)
        backbone = pyramid_backbone(name)
        model = Segmenter(backbone, "semantic-fpn", 3, 8) if kind is Segmenter else Detector(backbone, 2, width=8)
        names = ["a", "b", "c"][: model.num_classes]
        model.save(tmp_path / "w.safetensors", {"model": name, "classes": names, "short_side": 64})
        loaded = sgformer.load_model(tmp_path / "w.safetensors")
        assert type(loaded) is kind
        assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
        classifier = build_network(read_weights(tmp_path / "w.safetensors"), num_classes=6)
        own = classifier.state_dict()
        taken = {n: t for n, t in model.backbone.network.state_dict().items() if n in own}
        assert len(taken) > 20 and all(torch.equal(t, own[n]) for n, t in taken.items())
        assert classifier(torch.zeros(1, 3, 64, 64)).shape == (1, 6)


def test_what_is_no_checkpoint_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    (tmp_path / "notes.txt").write_text("hello")
    for name, words in (
        ("list.pt", "holds a list, not a checkpoint"),
        ("numbers.pt", "holds no weights"),
        ("notes.txt", "weights must be a run folder"),
        ("nowhere.pt", "no such file or run folder"),
    ):
        with pytest.raises(UserError, match=words):
            sgformer.load_model(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_weights_that_are_no_numbers_are_refused_before_they_give_some(value, tmp_path, capsys):
    model = sgformer.create_model("sgformer_n", num_classes=2)
    with torch.no_grad():
        model.head.fc.weight[1] = value
    about = {"task": "classify", "classes": ["a", "b"], "image_size": 32}
    sgformer.save_model(model, tmp_path / "w.safetensors", about)
    if value == 3e38:  # large, and a number
        assert torch.equal(sgformer.load_model(tmp_path / "w.safetensors").head.fc.weight, model.head.fc.weight)
        return
    for command in (["predict", "PATH", "a.png"], ["eval", "PATH", "--data", "d"], ["explain", "PATH", "a.png"]):
        (tmp_path / "a.png").write_bytes(b"")
        arguments = [str(tmp_path / "w.safetensors") if word == "PATH" else word for word in command]
        assert main([word.replace("a.png", str(tmp_path / "a.png")) for word in arguments]) == 2
        error = capsys.readouterr().err
        assert "w.safetensors: NaN or infinite values in head.fc.weight: " in error and error.count("\n") == 1


def test_predicting_with_a_plain_state_dict_uses_its_own_normalisation(network, tmp_path, capsys):
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = ["predict", str(tmp_path / "w.safetensors"), str(tmp_path / "a.png"), "--top", "7"]
    assert main([*arguments, "--model", TIMM, "--image-size", "160"]) == 0
    line = capsys.readouterr().out.split()
    about = timm.data.resolve_data_config(model=network)
    transform = timm.data.create_transform(**about)
    with torch.no_grad():
        shares = network(transform(Image.fromarray(pixels))[None]).softmax(-1)[0]
    order = shares.argsort(descending=True)
    assert line[1::3][:3] == [str(i) for i in order[:3].tolist()]
    assert float(line[2]) == pytest.approx(100 * float(shares.max()), abs=0.06)
    assert main(arguments) == 2 and "--model" in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_in_every_task_from_a_local_file(network, tmp_path):
    """A timm backbone from a plain file, with the normalisation it was trained with, which the run's weights keep."""
    from photos import make_photos

    from sgformer.data.scenes import make_scenes

    save_file(network.state_dict(), tmp_path / "w.safetensors")
    make_photos(tmp_path / "photos")
    make_scenes(tmp_path / "ade20k", 4, 2, image_size=64, layout="ade20k")
    make_scenes(tmp_path / "coco", 4, 2, image_size=64, layout="coco")
    common = {
        "weights": str(tmp_path / "w.safetensors"),
        "model": TIMM,
        "workers": 0,
        "device": "cpu",
        "drop_path": 0.0,
    }
    options = {
        "classify": {"data": "photos", "image_size": 64, "batch_size": 4, "epochs": 1, "warmup_epochs": 0},
        "segment": {"data": "ade20k", "image_size": 64, "batch_size": 2, "steps": 1, "val_every": 1, "head_width": 8},
        "detect": {"data": "coco", "image_size": 64, "batch_size": 2, "epochs": 1, "head_width": 8, "rois": 8},
    }
    for task, own in options.items():
        own = own | {"data": str(tmp_path / own["data"]), "run": str(tmp_path / f"run-{task}")}
        run = sgformer.train(task, max_steps=1, **common, **own)
        assert run.path.is_absolute()
        loaded = sgformer.load_model(run.path)
        assert loaded.metadata["mean"] == [0.5] * 3 and loaded.metadata["task"] == task
        image = Image.new("RGB", (64, 64), (200, 30, 30))
        assert len(sgformer.predict(run.path, image, device="cpu")) == 1
