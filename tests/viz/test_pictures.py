"""Pictures get made at any number of classes, images and epochs, and nothing global is left changed."""

import numpy as np
import pytest
from PIL import Image

matplotlib = pytest.importorskip("matplotlib")
from sgformer.viz.confusion import draw_confusion  # noqa: E402
from sgformer.viz.curves import draw_curves, read_metrics  # noqa: E402
from sgformer.viz.sheets import _label, draw_batch, draw_prediction  # noqa: E402

METRICS = """epoch,step,lr,train_loss,val_loss,top1,top5
0.5,10,0.001,2.1,,,
1,20,0.002,1.9,1.8,0.31,0.8
2,40,0.001,1.5,1.6,0.42,0.9
"""


def size(path):
    with Image.open(path) as image:
        image.load()
        return image.size


def test_metrics_are_read_by_column(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    series = read_metrics(tmp_path / "metrics.csv")
    assert series["train_loss"] == [(0.5, 2.1), (1, 1.9), (2, 1.5)] and series["top1"] == [(1, 0.31), (2, 0.42)]


@pytest.mark.parametrize("lines", [1, 2, 3, 4])
def test_curves_from_the_first_row_on(tmp_path, lines):
    (tmp_path / "metrics.csv").write_text("\n".join(METRICS.splitlines()[:lines]) + "\n")
    before = dict(matplotlib.rcParams)
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert min(size(tmp_path / "curves.png")) > 300 and dict(matplotlib.rcParams) == before
    assert [p.name for p in tmp_path.glob("*.tmp")] == []


@pytest.mark.parametrize("classes", [1, 2, 10, 30, 200])
def test_confusion_at_any_number_of_classes(tmp_path, classes):
    counts = np.random.default_rng(0).integers(0, 5, (classes, classes))
    counts[0] = 0  # a class without images
    draw_confusion(counts, [f"class {i}" for i in range(classes)], tmp_path / "confusion.png")
    assert 300 < min(size(tmp_path / "confusion.png")) < 2000


@pytest.mark.parametrize("images", [1, 3, 9, 40])
def test_batch_sheet(tmp_path, images):
    pixels = np.random.default_rng(0).random((images, 24, 32, 3))
    targets = np.eye(4)[np.arange(images) % 4]
    draw_batch(pixels, targets, ["a", "b", "c", "d" * 40], tmp_path / "sheet.png")
    assert min(size(tmp_path / "sheet.png")) > 100


def test_labels_of_mixed_images():
    names = ["cat", "dog", "owl"]
    assert _label(np.array([0, 1.0, 0]), names) == "dog"
    assert _label(np.array([0.3, 0, 0.7]), names) == "owl 70 + cat 30"


def test_prediction_picture(tmp_path):
    labels = [("a rather long class name, longer than the room", 0.7), ("b", 0.2), ("c", 0.1)]
    draw_prediction(np.zeros((40, 90, 3), np.uint8), labels, tmp_path / "p.png", "photo.jpg")
    assert min(size(tmp_path / "p.png")) > 300
