import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from sgformer.viz.detection import (
    Example,
    Instances,
    draw_detections,
    draw_examples,
    draw_precision_recall,
    draw_training_images,
    overlay,
    sure_points,
)
from sgformer.viz.segmentation import palette

NAMES = ("cat", "dog")


def objects(**more):
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 10:30, 10:40] = True
    masks[1, 40:55, 50:70] = True
    boxes = np.array([[10, 10, 40, 30], [50, 40, 70, 55]])
    return Instances(
        **{"boxes": boxes, "labels": np.array([0, 1]), "scores": np.array([0.9, 0.4]), "masks": masks, **more}
    )


def test_masks_and_boxes_are_drawn_where_they_are():
    grey = np.full((600, 800, 3), 100, np.uint8)
    masks = np.repeat(np.repeat(objects().masks, 10, 1), 10, 2)
    drawn = overlay(grey, objects(boxes=objects().boxes * 10, masks=masks), NAMES)
    assert drawn.shape == grey.shape
    colours = palette(NAMES)
    assert np.abs(drawn[200, 250] - (0.5 * 100 + 0.5 * colours[0])).max() <= 1  # inside the first mask
    assert (drawn[200, 100] == colours[0]).all() and (drawn[450, 500] == colours[1]).all()  # on the boxes' left edges
    assert (drawn[590, 10] == 100).all()


def test_skeletons_are_drawn_where_their_keypoints_are():
    grey = np.full((600, 800, 3), 100, np.uint8)
    found = np.array([[[150, 120, 0.9], [350, 280, 0.5], [250, 120, 0.001]], [[0, 0, 0], [0, 0, 0], [600, 500, 1]]])
    points = sure_points(found, 0.01)
    assert np.isnan(points[0, 2]).all() and points[0, 0].tolist() == [150, 120] and np.isnan(points[1, :2]).all()
    assert sure_points(found, 0.01, 0.5)[1, 2].tolist() == [600.5, 500.5]
    things = objects(boxes=objects().boxes * 10, masks=None, keypoints=points, edges=[[1, 2], [2, 3]])
    drawn, colours = overlay(grey, things, NAMES), palette(NAMES)
    assert (drawn[200, 250] == colours[0]).all()  # in the middle of the first edge
    assert (drawn[120, 150] == 255).all() and (drawn[280, 350] == 255).all() and (drawn[500, 600] == 255).all()
    assert (drawn[120, 250] == 100).all() and (drawn[200, 300] == 100).all()  # no third one, nor an edge to it
    assert len(things.above(0.5).keypoints) == 1 and things.above(0.5).edges == things.edges


def test_small_images_are_enlarged_and_nothing_is_fine_too():
    image = np.zeros((60, 80, 3), np.uint8)
    assert overlay(image, objects(), NAMES).shape == (420, 560, 3)
    nothing = Instances(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), None)
    assert not overlay(image, nothing, NAMES).any()


@pytest.mark.parametrize(("size", "drawn"), [((2000, 1), (2000, 1)), ((8, 150), (80, 1500)), ((8, 80), (160, 1600))])
def test_elongated_images_are_enlarged_less(size, drawn):
    """To a short side of 400, a picture of 20,000 x 1 pixels would take 10 GB."""
    box = objects(boxes=np.array([[0.0, 0, 1, 1]] * 2), masks=None)
    assert overlay(np.zeros((*size, 3), np.uint8), box, NAMES).shape == (*drawn, 3)


def test_only_confident_ones():
    kept = objects().above(0.5)
    assert len(kept.boxes) == len(kept.masks) == 1 and kept.labels.tolist() == [0]
    assert objects(scores=None).above(0.5).scores is None


@pytest.mark.slow
def test_files_are_written(tmp_path):
    image = np.zeros((60, 80, 3), np.uint8)
    draw_detections(image, objects(), NAMES, tmp_path / "a.png")
    draw_training_images([image] * 5, [objects(scores=None)] * 5, NAMES, tmp_path / "b.png")
    example = Example(image, objects(scores=None), objects(), "F1 50 %")
    draw_examples([example], [example] * 4, NAMES, tmp_path / "c.png")
    curves = np.array([np.linspace(1, 0, 101), np.full(101, np.nan)])
    draw_precision_recall({"box": curves, "mask": curves}, NAMES, tmp_path / "d.png")
    for name in "abcd":
        assert min(Image.open(tmp_path / f"{name}.png").size) > 100
    assert not list(tmp_path.glob("*.tmp"))
