"""The weights that come with the package: by name, in timm, in every task, offline."""

import dataclasses
import importlib.util
import logging
import re
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import sgformer
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.models import checkpoint
from sgformer.models.config import VARIANTS
from sgformer.models.load import build_network, find_weights, read_weights
from sgformer.models.pretrained import PRETRAINED, TAG, pretrained_file
from sgformer.training.config import RunConfig

NAME = "sgformer_n"


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def logits(model, image):
    with torch.no_grad():
        return model.eval()(image)


def test_timm_knows_the_weights():
    assert timm.list_pretrained("sgformer*") == [f"{NAME}.{TAG}"]
    model = timm.create_model(NAME, pretrained=True)
    assert model.num_classes == 200
    data = timm.data.resolve_data_config(model=model)
    about = read_weights(NAME).metadata
    assert data["input_size"][1:] == (about["image_size"],) * 2 and data["crop_pct"] == about["crop_pct"]
    assert len(about["classes"]) == 200 and "goldfish" in about["classes"] and "research" in about["terms"]


# What they see in photographs (a hat, trousers and a shirt are none of their classes): the three most
# probable classes, computed when they were made.
SEEN = {
    "014b2a1b": (("barrel", 0.1731), ("gasmask", 0.0464), ("potter's wheel", 0.0401)),
    "0257eb81": (("kimono", 0.0547), ("bannister", 0.0542), ("turnstile", 0.0505)),
    "060062e8": (("backpack", 0.1850), ("bannister", 0.1535), ("CD player", 0.0960)),
}


def test_what_they_see_in_three_photographs():
    shard = Path(__file__).parents[2] / "examples" / "photos" / "clothes" / "val" / "000000.tar"
    with tarfile.open(shard) as tar:
        for name in tar.getnames():
            if name.endswith(".jpg") and name[:8] in SEEN:
                (seen,) = sgformer.predict(NAME, tar.extractfile(name).read(), top=3)
                expected = SEEN[name[:8]]
                assert [label for label, _ in seen.labels] == [label for label, _ in expected]
                assert [share for _, share in seen.labels] == pytest.approx([p for _, p in expected], abs=2e-3)


def test_without_pretrained_a_network_is_fresh_and_has_a_thousand_classes():
    model = timm.create_model(NAME)
    assert model.num_classes == 1000 and model.pretrained_cfg["input_size"] == (3, 224, 224)


def test_the_same_weights_by_every_way_in(image):
    expected = logits(timm.create_model(NAME, pretrained=True), image)
    assert expected.dtype == torch.float32
    for model in (
        timm.create_model(f"{NAME}.{TAG}", pretrained=True),
        sgformer.create_model(NAME, pretrained=True),
        sgformer.load_model(NAME),
        sgformer.load_model(pretrained_file(NAME)),
    ):
        assert torch.equal(logits(model, image), expected)


def test_other_classes_channels_and_sizes(image):
    whole = timm.create_model(NAME, pretrained=True).eval()
    other = timm.create_model(NAME, pretrained=True, num_classes=7)
    assert logits(other, image).shape == (2, 7)
    with torch.no_grad():
        maps = timm.create_model(NAME, pretrained=True, features_only=True).eval()(image)
        expected = whole.forward_intermediates(image, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    grey = timm.create_model(NAME, pretrained=True, in_chans=1)
    same = image[:, :1].expand(-1, 3, -1, -1)
    assert torch.allclose(logits(grey, image[:, :1]), logits(whole, same), atol=1e-4)
    larger = timm.create_model(NAME, pretrained=True, img_size=128)
    assert logits(larger, torch.randn(1, 3, 128, 128)).shape == (1, 200)


def test_a_path_comes_before_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_weights(NAME) == pretrained_file(NAME)
    (tmp_path / NAME).mkdir()
    checkpoint.save_model(sgformer.create_model(NAME, num_classes=2), tmp_path / NAME / "best.safetensors")
    assert read_weights(NAME).tensors["head.fc.weight"].shape[0] == 2


def test_a_size_without_weights_says_which_has_some():
    with pytest.raises(UserError, match="sgformer_s: no such file or run folder; of the sizes, sgformer_n comes"):
        find_weights("sgformer_s")


@pytest.mark.parametrize(
    ("options", "resolved"),
    [
        ({"model": NAME}, f"{NAME}.{TAG}"),
        ({"model": NAME, "weights": "none"}, None),
        ({"model": NAME, "weights": None}, None),  # as in the config.yaml of older runs
        ({"model": "sgformer_s"}, None),
        ({"model": "resnet10t"}, None),
        ({"model": NAME, "weights": "mine.safetensors"}, "mine.safetensors"),
    ],
)
def test_auto_takes_the_weights_where_there_are_some(options, resolved):
    assert RunConfig(**options).with_weights().weights == resolved


def test_what_options_make_unfit_starts_fresh_and_is_counted(caplog):
    weights = read_weights(NAME)
    stages = list(VARIANTS[NAME].stages)
    stages[0] = dataclasses.replace(stages[0], scales=(2, 4))
    with caplog.at_level(logging.WARNING, "sgformer"):
        model = build_network(weights, num_classes=5, partial=True, stages=tuple(stages))
    unfit = [
        n for n, t in model.state_dict().items() if n not in weights.tensors or weights.tensors[n].shape != t.shape
    ]
    unfit = [name for name in unfit if not name.startswith("head.fc")]
    (line,) = caplog.messages
    assert unfit and f"{len(unfit)} of " in line and "start fresh" in line and unfit[0] in line
    for name, tensor in model.state_dict().items():
        assert name in unfit or name.startswith("head.fc") or torch.equal(tensor, weights.tensors[name]), name
    with pytest.raises(UserError, match="do not fit"):
        build_network(weights, stages=tuple(stages))


def test_weights_of_another_network_are_refused_whole():
    with pytest.raises(UserError, match="do not fit"):
        build_network(read_weights(NAME), partial=True, stages=VARIANTS["sgformer_s"].stages)


def test_files_are_as_readable_as_any_other(tmp_path):
    path = checkpoint.save_model(sgformer.create_model(NAME, num_classes=2), tmp_path / "m.safetensors")
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_commands_take_the_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 64), "orange").save("orange.png")
    assert main(["predict", NAME, "orange.png"]) == 0
    assert re.search(r"orange.png +[A-Za-z' -]+ [0-9.]+ %", capsys.readouterr().out)
    (prediction,) = sgformer.predict(NAME, ["orange.png"])
    assert set(dict(prediction.labels)) <= set(read_weights(NAME).metadata["classes"])
    if importlib.util.find_spec("matplotlib"):
        assert main(["explain", NAME, "orange.png", "--out", "explained"]) == 0
        assert (tmp_path / "explained" / "index.html").exists()


@pytest.mark.parametrize("key", ["classes", "wordnet"])
def test_evaluation_knows_the_classes_by_name_and_by_wordnet_id(tmp_path, key):
    pytest.importorskip("lightning")
    folders = read_weights(NAME).metadata[key]
    for folder in folders[:2]:
        (tmp_path / "val" / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64), "orange").save(tmp_path / "val" / folder / "0.png")
    result = sgformer.evaluate(NAME, tmp_path, workers=0, device="cpu")
    assert result.confusion.sum(1).tolist() == [1, 1] + [0] * 198


def test_small_enough_to_ship():
    assert set(PRETRAINED) == {NAME} and pretrained_file(NAME).stat().st_size <= 4e6
