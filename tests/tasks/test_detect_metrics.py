"""AP on scenes solved by hand, and equality with pycocotools run on the written files."""

import json
import math

import numpy as np
import pytest
from coco_scene import content, rectangle, thing, write_coco

pytest.importorskip("pycocotools")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sgformer.data.coco import ground_truth, read_coco
from sgformer.tasks.detect.metrics import NUMBERS, CocoMetric, DetectionEvaluation, report

A, B, C = [4, 4, 20, 20], [30, 10, 24, 30], [2, 30, 12, 10]


def metric(tmp_path, annotations, **more):
    listing = read_coco(write_coco(tmp_path, content(annotations, **more)), tmp_path / "train")
    return CocoMetric(ground_truth(listing), listing.classes, listing.own_ids, listing.has_masks)


def rle(box):
    from pycocotools import mask

    packed = mask.merge(mask.frPyObjects(rectangle(*box), 48, 64))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def found(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score, "segmentation": rle(box)}


def test_everything_found_is_one(tmp_path):
    result = metric(tmp_path, [thing(10, 3, A), thing(20, 7, B)]).evaluate(
        [found(10, 3, A, 0.9), found(20, 7, B, 0.8)], [10, 20]
    )
    for numbers in (result.box, result.mask):
        assert [numbers[name] for name in ("AP", "AP50", "AR100")] == pytest.approx([1, 1, 1])
    assert (result.images, result.objects) == (2, 2)
    assert [(r["class"], r["objects"]) for r in result.classes] == [("cat", 1), ("dog", 1)]
    assert [r["box_AP"] for r in result.classes] == pytest.approx([1, 1])


def test_one_of_two_found(tmp_path):
    result = metric(tmp_path, [thing(10, 3, A), thing(20, 3, B)]).evaluate([found(10, 3, A, 0.9)], [10, 20])
    # Precision 1 up to recall .5: 51 of the 101 recalls 0, .01 ... 1.
    assert result.box["AP"] == pytest.approx(51 / 101)
    assert result.box["AR100"] == pytest.approx(0.5)
    assert np.allclose(result.precision["box"][0], np.arange(101) <= 50)
    assert np.isnan(result.precision["box"][1]).all() and result.classes[1]["box_AP"] is None
    assert result.image_scores == {10: 1.0, 20: 0.0}


def test_a_false_alarm_before_the_hit_halves_precision(tmp_path):
    result = metric(tmp_path, [thing(10, 3, A)]).evaluate([found(10, 3, B, 0.9), found(10, 3, A, 0.8)], [10, 20])
    assert result.box["AP50"] == pytest.approx(0.5)
    assert result.image_scores[10] == pytest.approx(2 / 3)
    assert math.isnan(result.image_scores.get(20, math.nan))


def test_a_box_that_overlaps_in_part_counts_up_to_its_iou(tmp_path):
    # 20 x 20 against 20 x 16 inside it: IoU .8, so right at .5, .55 ... .8 and wrong at .85, .9, .95.
    result = metric(tmp_path, [thing(10, 3, A)]).evaluate([found(10, 3, [4, 4, 20, 16], 0.9)], [10])
    assert result.box["AP"] == pytest.approx(0.7)
    assert (result.box["AP50"], result.box["AP75"]) == pytest.approx((1, 1))


def test_detections_in_a_crowd_region_are_no_false_alarms(tmp_path):
    crowd = thing(10, 3, [28, 8, 30, 36], iscrowd=1, segmentation={"size": [48, 64], "counts": [0, 48 * 64]})
    detections = [found(10, 3, B, 0.9), found(10, 3, A, 0.8)]
    assert metric(tmp_path, [thing(10, 3, A)]).evaluate(detections, [10]).box["AP50"] == pytest.approx(0.5)
    result = metric(tmp_path, [thing(10, 3, A), crowd]).evaluate(detections, [10])
    assert result.box["AP50"] == pytest.approx(1) and result.objects == 1


def test_an_object_numbered_zero_is_found_too(tmp_path):
    data = content([thing(10, 3, A)])
    data["annotations"][0]["id"] = 0
    listing = read_coco(write_coco(tmp_path, data), tmp_path / "train")
    truth = CocoMetric(ground_truth(listing), listing.classes, listing.own_ids, True)
    assert truth.evaluate([found(10, 3, A, 0.9)], [10]).box["AP"] == pytest.approx(1)


def test_nothing_found_is_zero_and_nothing_there_is_unknown(tmp_path):
    result = metric(tmp_path, [thing(10, 3, A)]).evaluate([], [10, 20])
    assert result.box["AP"] == result.mask["AP"] == 0
    assert math.isnan(result.box["APl"])
    empty = metric(tmp_path, []).evaluate([], [10, 20])
    assert math.isnan(empty.box["AP"]) and empty.metrics()["box_ap"] == 0
    assert "box AP -" in empty.headline()


def test_images_left_out_do_not_count(tmp_path):
    truth = metric(tmp_path, [thing(10, 3, A), thing(20, 3, B)])
    result = truth.evaluate([found(10, 3, A, 0.9)], [10], ["20.png: broken"])
    assert result.box["AP"] == pytest.approx(1)
    assert (result.images, result.objects, result.skipped) == (1, 1, ("20.png: broken",))


def scribbled(seed, images=12):
    """Random annotations and detections that fit them more or less, with a crowd region and masks that are no boxes."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(10, 10 * images + 1, 10):
        for _ in range(rng.integers(0, 5)):
            box = [*rng.integers(0, 30, 2).tolist(), *rng.integers(4, 30, 2).tolist()]
            category = int(rng.choice([3, 7]))
            annotations.append(thing(image, category, box, iscrowd=int(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 3)):
                moved = (np.array(box) + rng.normal(0, 2, 4)).clip(1, 60).tolist()
                results.append(found(image, category, moved, float(rng.random())))
    return annotations, results


@pytest.mark.parametrize("seed", range(3))
def test_numbers_equal_pycocotools_on_the_written_files(tmp_path, seed):
    annotations, results = scribbled(seed)
    truth = metric(tmp_path, annotations, images=12)
    result = truth.evaluate(results, [10 * i for i in range(1, 13)])
    result.write(tmp_path / "out", picture=False)
    original = COCO(str(tmp_path / "annotations" / "instances_train.json"))
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        detections = original.loadRes(str(tmp_path / "out" / f"results_{kind}.json"))
        plain = COCOeval(original, detections, name)
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
        expected = [math.nan if v < 0 else v for v in plain.stats.tolist()]
        assert np.array_equal([result.kinds[kind][n] for n in NUMBERS], expected, equal_nan=True)
        assert 0 < result.kinds[kind]["AP"] < 1


def test_files_come_back(tmp_path):
    annotations, results = scribbled(0)
    result = metric(tmp_path, annotations, images=12).evaluate(results, [10 * i for i in range(1, 13)], ["x: bad"])
    result.write(tmp_path / "out")
    assert (tmp_path / "out" / "precision_recall.png").stat().st_size > 5000
    again = DetectionEvaluation.read(tmp_path / "out")
    for kind in ("box", "mask"):
        assert again.kinds[kind] == pytest.approx(result.kinds[kind], nan_ok=True)
        assert np.allclose(again.precision[kind], result.precision[kind], equal_nan=True, atol=1e-5)
    assert (again.images, again.objects, again.skipped) == (12, result.objects, ("x: bad",))
    assert [r["class"] for r in again.classes] == ["cat", "dog"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["box"]["AP"] == result.box["AP"]
    text = report("sgformer_n", again, {"Time": "1:00"}, [("Curves", "curves.png")])
    assert f"box AP {100 * result.box['AP']:.1f}" in text and "| cat |" in text and "![Curves](curves.png)" in text


def test_boxes_only(tmp_path):
    annotations = [thing(10, 3, A, segmentation=[])]
    truth = metric(tmp_path, annotations)
    result = truth.evaluate([{k: v for k, v in found(10, 3, A, 0.9).items() if k != "segmentation"}], [10])
    assert (
        result.box["AP"] == pytest.approx(1)
        and result.mask == {}
        and set(result.metrics())
        == {
            "box_ap",
            "box_ap50",
            "box_ap75",
        }
    )
