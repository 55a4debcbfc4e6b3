"""Label PNGs read back as the classes; pictures get made for any classes and sizes."""

import numpy as np
import pytest
from PIL import Image

matplotlib = pytest.importorskip("matplotlib")
from sgformer.data.ade20k import read_label_map  # noqa: E402
from sgformer.viz.segmentation import (  # noqa: E402
    blend,
    draw_comparison,
    draw_overlay,
    draw_training_batch,
    palette,
    write_label_png,
)


def names(n):
    return [f"class {i}" for i in range(n)]


@pytest.mark.parametrize(("classes", "first", "mode"), [(3, 0, "P"), (150, 1, "P"), (255, 1, "P"), (256, 1, "I;16")])
def test_label_pngs_read_back(tmp_path, classes, first, mode):
    labels = np.random.default_rng(0).integers(0, classes, (9, 13))
    write_label_png(labels, tmp_path / "a.png", names(classes), first)
    assert np.array_equal(read_label_map(tmp_path / "a.png"), labels + first)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
        if mode == "P":  # a viewer shows the palette's colours
            assert np.array_equal(np.asarray(image.convert("RGB")), palette(names(classes))[labels])


def test_colours_are_distinct_and_stay():
    few, many = palette(names(10)), palette(names(150))
    assert np.array_equal(few, many[:10])
    assert len(np.unique(many, axis=0)) == 150
    apart = np.abs(few[:, None].astype(int) - few).sum(-1) + 999 * np.eye(10, dtype=int)
    assert apart.min() > 60
    red, green, blue = palette(["background", "a"])[0].tolist()
    assert max(red, green, blue) - min(red, green, blue) < 20  # the ground is grey


def test_overlay_colours_classes_but_neither_ground_nor_unlabelled():
    image = np.full((40, 60, 3), 100, dtype=np.uint8)
    labels = np.zeros((40, 60), dtype=int)
    labels[:, 20:40], labels[:, 40:] = 1, 255
    mixed = blend(image, labels, ["background", "cat"])
    zoom = mixed.shape[0] // 40
    middle = mixed[20 * zoom, [10 * zoom, 30 * zoom, 50 * zoom]]
    assert np.allclose(middle[[0, 2]], 100 / 255)
    assert np.allclose(middle[1], 0.45 * 100 / 255 + 0.55 * palette(["background", "cat"])[1] / 255)
    assert mixed[20 * zoom, 20 * zoom].min() > 0.8  # a light line between them


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 30])
@pytest.mark.parametrize("size", [(30, 30), (20, 200), (300, 40)])
def test_pictures_get_made(tmp_path, classes, size):
    rng = np.random.default_rng(0)
    before = dict(matplotlib.rcParams)
    images = rng.random((3, *size, 3))
    labels = rng.integers(0, classes, (3, *size))
    labels[0] = 255
    draw_overlay((images[0] * 255).astype(np.uint8), labels[1], names(classes), tmp_path / "1.png", "a.jpg")
    draw_training_batch(images, labels, names(classes), tmp_path / "2.png")
    draw_comparison(images, labels, labels % classes, names(classes), tmp_path / "3.png", ["x", "y", "z"])
    for i in (1, 2, 3):
        with Image.open(tmp_path / f"{i}.png") as picture:
            picture.load()
            assert min(picture.size) > 100
    assert dict(matplotlib.rcParams) == before and len(list(tmp_path.iterdir())) == 3
