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
    label_places,
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


def test_labels_do_not_hide_objects_or_each_other():
    def one(*box, others=()):
        boxes = np.array([box, *others], float)
        return label_places(boxes, np.full((len(boxes), 2), (40.0, 10.0)), (100, 100))[0].tolist()

    assert one(20, 30, 60, 50) == [20, 20]  # above
    assert one(20, 5, 80, 50) == [20, 5] and one(20, 5, 32, 17) == [20, 17]  # no room above: within, or below
    assert one(90, 30, 99, 50) == [60, 20]  # not beyond the image
    assert one(20, 30, 80, 70, others=[(30, 20, 40, 29)]) == [20, 30]  # above is another object
    assert np.isnan(one(20, 30, 30, 40, others=[(20, 18, 40, 29), (20, 41, 30, 50)])).all()
    draw = np.random.default_rng(0)
    corners = draw.uniform(0, 280, (60, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(4, 20, (60, 2))], 1)
    sizes = np.tile([40.0, 10.0], (60, 1))
    places = label_places(boxes, sizes, (300, 300))
    labels = np.concatenate([places, places + sizes], 1)
    kept = np.flatnonzero(~np.isnan(places[:, 0]))
    assert 20 < len(kept) < 60 and kept[0] == 0

    def hidden(box, cover):
        sides = np.minimum(box[2:], cover[2:]) - np.maximum(box[:2], cover[:2])
        return sides.clip(min=0).prod() / (box[2:] - box[:2]).prod()

    for i in kept:
        assert all(hidden(box, labels[i]) <= 1 / 4 for box in boxes)
        assert all(hidden(labels[j], labels[i]) <= 1 / 4 for j in kept if j < i)  # of better objects
        assert labels[i].min() >= 0 and labels[i].max() <= 300


def test_a_crowd_of_small_objects_stays_visible():
    masks = np.zeros((100, 400, 400), bool)
    boxes = np.array([[x, y, x + 12, y + 12] for y in range(5, 400, 40) for x in range(5, 400, 40)], float)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
    crowd = Instances(boxes, np.zeros(100, int), np.linspace(1, 0.5, 100), masks)
    for names in (["nucleus"], ["nucleus", "cytoplasm"]):
        drawn, colour = overlay(np.full((400, 400, 3), 100, np.uint8), crowd, names), palette(names)[0]
        tinted = np.abs(drawn - (0.5 * 100 + 0.5 * colour)).max(-1) <= 1
        assert all(tinted[mask].mean() > 0.3 for mask in masks)  # its outline has most of the rest


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
