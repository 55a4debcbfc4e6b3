"""Embeddings of weights of every task, and the classifiers that say how good they are."""

import json

import numpy as np
import pytest
import timm
import torch
from photos import make_photos

import sgformer
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.data.image import read_image
from sgformer.models.load import read_weights, save_weights
from sgformer.models.pyramid import pyramid_backbone
from sgformer.tasks.features import hold_out, preparation, score_neighbours, score_probe
from sgformer.tasks.segment.network import Segmenter

TIMM = "test_efficientnet_gn"
ABOUT = {"task": "classify", "classes": ["a", "b", "c", "d"], "image_size": [64, 64], "crop_pct": 0.8}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=4, img_size=64)
    return sgformer.save_model(model, tmp_path_factory.mktemp("weights") / "n.safetensors", ABOUT)


def pixels_of(path, images):
    prepare = preparation(read_weights(path))
    return torch.stack([prepare(read_image(image)) for image in images])


# -- embeddings -------------------------------------------------------------------------------------------------------


def test_a_classifiers_embeddings_are_what_its_last_layer_sees(photos, weights):
    found = sgformer.embed(weights, photos / "val", batch_size=4)
    images = sorted((photos / "val").rglob("*.png"))
    assert list(found.images) == list(map(str, images)) and found.features.dtype == np.float32
    model, x = sgformer.load_model(weights), pixels_of(weights, images)
    assert x.shape[-2:] == (64, 64) and preparation(read_weights(weights)).crop_pct == 0.8
    with torch.inference_mode():
        logits = model.head.fc(torch.from_numpy(found.features))
        assert torch.allclose(logits, model(x), atol=1e-5)
    larger = sgformer.embed(weights, photos / "val", image_size=96)
    assert larger.features.shape == found.features.shape and not np.allclose(larger.features, found.features)


@pytest.mark.slow
def test_many_images_take_the_prepared_network(weights, photos):
    image = read_image(photos / "val/ant/0.png")
    few, many = sgformer.embed(weights, image), sgformer.embed(weights, [image] * 64)
    assert few.images == ("0",) and np.allclose(many.features, few.features, atol=1e-4)


def test_other_networks_of_timm(photos, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(TIMM, num_classes=4).eval()
    save_weights(model, tmp_path / "t.safetensors", {**ABOUT, "model": TIMM})
    found = sgformer.embed(tmp_path / "t.safetensors", photos / "val/ant")
    x = pixels_of(tmp_path / "t.safetensors", sorted((photos / "val/ant").iterdir()))
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert np.allclose(found.features, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["sgformer_n", TIMM])
def test_dense_tasks_give_the_mean_of_their_backbones_last_map(photos, tmp_path, name):
    path = tmp_path / "s.safetensors"
    torch.manual_seed(0)
    model = Segmenter(pyramid_backbone(name), "semantic-fpn", 3, 16).eval()
    about = {"classes": ["x", "y", "z"], "short_side": 48, "reduce_zero_label": False, "mean": [0.5] * 3}
    model.save(path, {"task": "segment", "model": name, **about})
    found = sgformer.embed(path, photos / "val/ant")
    x = pixels_of(path, sorted((photos / "val/ant").iterdir()))
    assert x.shape[-2:] == (224, 224) and preparation(read_weights(path)).normalization.mean == (0.5,) * 3
    with torch.inference_mode():
        expected = model.backbone(x)[-1].mean((2, 3))
    assert np.allclose(found.features, expected.numpy(), atol=1e-5)
    assert np.array_equal(found.features, sgformer.embed(path, photos / "val/ant").features)


def test_a_detector(photos, tmp_path):
    pytest.importorskip("pycocotools")
    from sgformer.tasks.detect.network import Detector

    torch.manual_seed(0)
    model = Detector(pyramid_backbone("sgformer_n"), 3, masks=False, width=16).eval()
    about = {"task": "detect", "model": "sgformer_n", "classes": ["x", "y", "z"], "category_ids": [1, 2, 3]}
    model.save(tmp_path / "d.safetensors", {**about, "image_size": [64, 96]})  # its sides, not a crop
    x = pixels_of(tmp_path / "d.safetensors", [photos / "val/ant/0.png"])
    assert x.shape[-2:] == (224, 224)
    with torch.inference_mode():
        expected = model.backbone(x)[-1].mean((2, 3))
    assert np.allclose(
        sgformer.embed(tmp_path / "d.safetensors", photos / "val/ant/0.png").features, expected, atol=1e-5
    )


def test_the_command_writes_a_file_that_numpy_reads(photos, weights, tmp_path, capsys):
    out = tmp_path / "f.npz"
    assert main(["predict", str(weights), str(photos / "val"), "--features", str(out)]) == 0
    assert "features 9 x " in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["f.npz"]
    read, found = np.load(out, allow_pickle=False), sgformer.embed(weights, photos / "val")
    assert read["names"].tolist() == list(found.images) and np.array_equal(read["features"], found.features)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "f.csv"], "--features f.csv: the file's name must end in .npz"),
        (["--features", "f.npz", "--top", "3"], "--features writes embeddings only; leave out --top"),
        (["--features", "f.npz", "--json", "-"], "leave out --json"),
    ],
)
def test_mistakes_take_one_line(photos, weights, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(weights), str(photos / "val"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_exported_files_and_broken_weights_have_no_embeddings(photos, weights, tmp_path):
    with pytest.raises(UserError, match="an exported file has no embeddings; take them from the weights"):
        sgformer.embed(tmp_path / "n.onnx", photos)
    model = sgformer.load_model(weights)
    with torch.no_grad():
        model.stages[3].norm.weight.fill_(3e38)
    sgformer.save_model(model, tmp_path / "bad.safetensors", ABOUT)
    with pytest.raises(UserError, match=r"bad\.safetensors: its features are NaN or infinite"):
        sgformer.embed(tmp_path / "bad.safetensors", photos / "val")


# -- classifiers ------------------------------------------------------------------------------------------------------


def clusters(count, classes=6, seed=0, spread=0.6):
    """Unit directions of classes, and features around them whose lengths mean nothing."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(size=(classes, 8))
    x = (centres[y] + spread * rng.normal(size=(count, 8))) * rng.uniform(0.1, 10, (count, 1))
    return x.astype(np.float32), y


def test_neighbours_vote_as_in_dino():
    (x, y), (x_scored, y_scored) = clusters(60), clusters(30, seed=1, spread=1.0)
    result = score_neighbours(x, y, x_scored, y_scored, 6)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, x_scored)]
    top1, top5 = [], []
    for image, truth in zip(unit[1], y_scored, strict=True):
        similarity = unit[0] @ image
        nearest = np.argsort(-similarity)[:20]
        votes = np.bincount(y[nearest], np.exp(similarity[nearest] / 0.07), minlength=6)
        top1.append(votes.argmax() == truth)
        top5.append(truth in np.argsort(-votes, kind="stable")[:5])
    assert result == {"top1": np.mean(top1), "top5": np.mean(top5), "k": 20, "temperature": 0.07}
    assert 0.5 < result["top1"] < 1


def test_neighbours_are_at_most_all_images():
    result = score_neighbours(np.eye(3, dtype=np.float32), np.arange(3), np.eye(3, dtype=np.float32), np.arange(3), 3)
    assert result["k"] == 3 and result["top1"] == result["top5"] == 1


def test_the_probe_tells_apart_what_is_apart_and_knows_nothing_of_the_scored_labels():
    (x, y), (x_scored, y_scored) = clusters(120), clusters(60, seed=1)
    x, x_scored = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, x_scored))
    result = score_probe(x, y, x_scored, y_scored)
    assert result["top1"] > 0.9 and result["converged"]
    other = score_probe(x, y, x_scored, np.roll(y_scored, 1))
    assert other["penalty"] == result["penalty"] and other["held_out_top1"] == result["held_out_top1"]
    noise = np.random.default_rng(0).normal(size=(120, 40)).astype(np.float32)
    assert score_probe(noise, y, noise[::-1].copy(), y)["held_out_top1"] < 0.5  # not scored on what it was fitted to


@pytest.mark.filterwarnings("error")
def test_two_classes_can_be_probed():
    (x, y), (x_scored, y_scored) = clusters(80, classes=2), clusters(40, classes=2, seed=1)
    x, x_scored = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, x_scored))
    result = score_probe(x, y, x_scored, y_scored)
    assert result["top1"] > 0.9 and result["top5"] == 1
    assert score_probe(x, y, x_scored, 1 - y_scored)["top1"] == pytest.approx(1 - result["top1"])


def test_a_fifth_of_each_class_is_held_out():
    y = np.array([0] * 50 + [1] * 9 + [2] * 2 + [3])
    held = hold_out(y)
    assert [int(held[y == c].sum()) for c in range(4)] == [10, 1, 1, 0] and np.array_equal(held, hold_out(y))
    with pytest.raises(UserError, match="no class has two training images"):
        score_probe(np.eye(3, dtype=np.float32), np.arange(3), np.eye(3, dtype=np.float32), np.arange(3))


def test_the_command_scores_features(photos, weights, tmp_path, capsys):
    command = ["eval", str(weights), "--data", str(photos), "--workers", "0", "--out", str(tmp_path / "o")]
    assert main([*command, "--knn", "--linear-probe"]) == 0
    out = capsys.readouterr().out
    assert "k-NN          top-1" in out and "linear probe  top-1" in out
    assert "9 images of 3 classes" in out and "18 training images" in out  # the weights' own classes are four others
    stored = json.loads((tmp_path / "o/features.json").read_text())
    x, x_scored = (sgformer.embed(weights, photos / split).features for split in ("train", "val"))
    expected = score_neighbours(x, np.repeat(np.arange(3), 6), x_scored, np.repeat(np.arange(3), 3), 3)
    assert stored["knn"] == pytest.approx(expected) and set(stored["linear_probe"]) >= {"top1", "penalty"}
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["features.json"]
    assert main([*command, "--knn", "--precision", "bf16"]) == 2
    assert main([*command, "--knn", "--split", "train"]) == 2
    assert main([*command, "--knn", "--flip"]) == 2
    assert main(["eval", str(weights), "--knn"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2][:18] for line in errors] == [
        *("--knn runs on one ", "--split train", "--flip does not go", "--data is missing")
    ]


def test_unreadable_images_are_left_out_and_counted(weights, tmp_path):
    photos = make_photos(tmp_path / "photos")
    (photos / "val/bee/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.png"):
        sgformer.evaluate(weights, photos, knn=True, workers=0)
    result = sgformer.evaluate(weights, photos, knn=True, workers=0, bad_images="skip")
    assert result.images == 8 and len(result.skipped) == 1 and result.linear_probe is None
