"""Semantic segmentation from files to files: mIoU is what the written label maps give; wrong options are named."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")

import sgformer
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.data.ade20k import collate, read_label_map
from sgformer.models.pyramid import pyramid_backbone
from sgformer.tasks.registry import get_task
from sgformer.tasks.segment.config import SegmentConfig
from sgformer.tasks.segment.network import MULTI_SCALE, Segmenter
from sgformer.tasks.segment.predict import inference_settings
from sgformer.training.config import make_config, read_yaml

RECIPES = sorted(Path(__file__).parents[2].glob("recipes/segment_*.yaml"))
CLASSES = ("sky", "sea", "sand")


@pytest.fixture(scope="module")
def beach(tmp_path_factory):
    """Stripes of three colours under noise, of several sizes, some pixels labelled 0: no class."""
    root, rng = tmp_path_factory.mktemp("beach"), np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 5)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            height, width = 40 + 8 * (i % 2), 56 - 6 * (i % 3)
            labels = 1 + np.sort(rng.integers(0, 3, height))[:, None].repeat(width, 1)
            labels[:3] = 0
            pixels = np.array([[0, 0, 0], [90, 140, 220], [20, 90, 120], [220, 190, 120]])[labels]
            noisy = (pixels + rng.normal(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / f"images/{split}/{i}.png")
            Image.fromarray(labels.astype(np.uint8)).save(root / f"annotations/{split}/{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = Segmenter(pyramid_backbone("sgformer_n"), "semantic-fpn", 3, 16)
    path = tmp_path_factory.mktemp("weights") / "beach.safetensors"
    metadata = {"model": "sgformer_n", "short_side": 40, "image_size": 32, "reduce_zero_label": True}
    model.save(path, {**metadata, "classes": list(CLASSES)})
    return path


def miou_of_files(truths, guesses):
    """mIoU of label maps on disk, 0 being no class."""
    counts = np.zeros((3, 3), dtype=int)
    for truth, guess in zip(truths, guesses, strict=True):
        a, b = read_label_map(truth), read_label_map(guess)
        assert a.shape == b.shape
        np.add.at(counts, (a[a > 0].astype(int) - 1, b[a > 0].astype(int) - 1), 1)
    hits, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
    return (hits[union > 0] / union[union > 0]).mean(), hits.sum() / counts.sum(), counts


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--multi-scale", "--flip"], ["--sliding"]])
def test_the_numbers_are_those_of_the_written_label_maps(beach, weights, options, tmp_path, capsys):
    standard = ["--device", "cpu"]
    assert (
        main(
            [
                "eval",
                str(weights),
                "--data",
                str(beach),
                "--workers",
                "0",
                "--out",
                str(tmp_path / "e"),
                *standard,
                *options,
            ]
        )
        == 0
    )
    images = str(beach / "images/validation")
    assert main(["predict", str(weights), images, "--out", str(tmp_path / "p"), *standard, *options]) == 0
    shown = capsys.readouterr().out
    guesses = sorted((tmp_path / "p").glob("*_labels.png"))
    miou, accuracy, counts = miou_of_files(sorted((beach / "annotations/validation").iterdir()), guesses)
    numbers = json.loads((tmp_path / "e/metrics.json").read_text())
    assert numbers["miou"] == pytest.approx(miou) and numbers["pixel_accuracy"] == pytest.approx(accuracy)
    assert numbers["images"] == 5 and numbers["pixels"] == counts.sum()
    assert f"mIoU {100 * miou:.2f} %" in shown
    with (tmp_path / "e/classes.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(CLASSES)
    assert {p.name for p in (tmp_path / "e").iterdir()} >= {"confusion.png", "confusion.csv", "examples.png"}
    assert len(list((tmp_path / "p").glob("*_overlay.png"))) == 5


def test_eval_counts_do_not_depend_on_the_batch_size(beach, weights):
    one, five = (sgformer.evaluate(weights, beach, batch_size=size, workers=0, device="cpu") for size in (1, 5))
    assert np.array_equal(one.confusion, five.confusion) and one.loss == pytest.approx(five.loss, rel=1e-5)


def test_predictions_from_python(beach, weights):
    image = Image.open(beach / "images/validation/0.png")
    (segments,) = sgformer.predict(weights, image, device="cpu")
    assert segments.labels.shape == image.size[::-1] and segments.first == 1
    assert sum(share for _, share in segments.shares()) == pytest.approx(1)
    assert {name for name, _ in segments.shares()} <= set(CLASSES)


def test_predict_tells_json(beach, weights, capsys):
    images = [str(beach / "images/validation/0.png"), str(beach / "images/training/0.png")]
    assert main(["predict", str(weights), *images, "--json", "-", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in told] == images and told[0]["classes"][0]["class"] in CLASSES


def test_images_of_one_name_keep_their_own_files(beach, weights, tmp_path):
    images = [str(beach / "images/validation/0.png"), str(beach / "images/training/0.png")]
    assert main(["predict", str(weights), *images, "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        *("0_labels.png", "0_overlay.png", "0-2_labels.png", "0-2_overlay.png")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "WEIGHTS"], "--data is missing: the folder with images/validation"),
        (["eval", "WEIGHTS", "--data", "BEACH", "--crop-pct", "0.9"], "--crop-pct is for weights of classify"),
        (["predict", "WEIGHTS", "BEACH", "--top", "3"], "--top is for weights of classify"),
        (["eval", "WEIGHTS", "--data", "BEACH", "--split", "test"], "test: no such folder"),
        (["eval", "WEIGHTS", "--data", "BEACH", "--image-size", "[40,48]"], "--image-size is one number"),
        (["eval", "WEIGHTS", "--data", "BEACH", "--image-size", "8"], "must be 32 pixels or more"),
        (["eval", "WEIGHTS", "--data", "nowhere"], "nowhere: no such folder"),
        (["predict", "WEIGHTS", "nowhere.jpg"], "nowhere.jpg: no such image"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, beach, weights, capsys):
    named = [a.replace("WEIGHTS", str(weights)).replace("BEACH", str(beach)) for a in arguments]
    assert main(named) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and "Traceback" not in shown


def test_how_images_are_looked_at():
    metadata = {"short_side": 512, "image_size": [512, 640]}
    assert inference_settings(metadata).window is None and inference_settings(metadata).short_side == 512
    assert inference_settings(metadata, sliding=True).window == (512, 640)
    assert inference_settings(metadata, sliding=True, image_size=256).window == (256, 256)
    assert inference_settings(metadata, image_size=256).short_side == 256
    assert inference_settings(metadata, multi_scale=True, flip=True).scales == MULTI_SCALE


STEPS = {"80k": 80000, "160k": 160000, "scenes": 1000}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_starts(recipe, beach):
    """Two updates of the recipe's own network, at reduced size."""
    assert len(RECIPES) == 7
    small = {"image_size": 32, "batch_size": 2, "head_width": 16, "workers": 0, "precision": "fp32"}
    small |= {"data": str(beach), "reduce_zero_label": True}  # as these labels want it
    values = read_yaml(recipe, SegmentConfig)
    assert values["model"] == f"sgformer_{recipe.stem.split('_')[1]}"
    config, task = make_config(SegmentConfig, {**values, **small}), get_task("segment")
    splits = task.splits(config, None, 2, 0, 1)
    module = task.module(config, splits, None)
    assert module.class_names == CLASSES and splits.total_steps == STEPS[recipe.stem.split("_")[-1]]
    optimizer = module.configure_optimizers()["optimizer"]
    module.train()
    batches = iter(splits.train_sampler)
    for _ in range(2):
        loss = module.training_step(collate([splits.train[key] for key in next(batches)]), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)


def test_upernet_with_single_images_is_refused(beach):
    config = SegmentConfig(data=str(beach), head="upernet", model="sgformer_n", batch_size=1)
    with pytest.raises(UserError, match="two images at a time"):
        get_task("segment").splits(config, None, 1, 0, 1)
