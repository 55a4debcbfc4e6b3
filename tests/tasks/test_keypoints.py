"""Keypoints: AP equal to pycocotools', flips and sigmas of a run, weights, and what is refused."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from coco_scene import POINTS, pointed, pointed_content, thing, write_coco

pytest.importorskip("lightning")
pytest.importorskip("pycocotools")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

import sgformer
from sgformer.core.errors import UserError
from sgformer.data.coco import CocoDataset, collate, read_coco
from sgformer.data.detection_transforms import eval_transform, train_transform
from sgformer.data.imagefolder import EpochSampler
from sgformer.data.keypoints import PERSON, SIGMA, Skeleton
from sgformer.models.load import read_weights
from sgformer.models.pyramid import pyramid_backbone
from sgformer.results import as_coco, coco_result
from sgformer.tasks.detect.metrics import KINDS, DetectionEvaluation, report
from sgformer.tasks.detect.module import DetectionModule
from sgformer.tasks.keypoints.config import KeypointsConfig
from sgformer.tasks.keypoints.data import flips, keypoint_metric, open_data, read_listings, sigmas_of
from sgformer.tasks.keypoints.network import KeypointDetector, new_keypoint_detector
from sgformer.training.trainer import build_trainer, quiet

QUICK = {"model": "sgformer_n", "image_size": 64, "batch_size": 2, "head_width": 16, "rois": 16, "drop_path": 0.0}
BOX = [4, 4, 24, 24]
SIGMAS = [0.03, 0.05, 0.05, 0.1]


def config(**more):
    return KeypointsConfig(**{**QUICK, **more}).resolved()


def small(classes=2, keypoints=4):
    return KeypointDetector(pyramid_backbone("sgformer_n"), classes, keypoints, width=16, rois=16)


def listing_of(root, data, split="train"):
    return read_coco(write_coco(root, data, split), root / split, keypoints=True, masks=False)


# -- metrics ----------------------------------------------------------------------------------------------------------


def found(entry, moved, score):
    """A result for an annotation whose keypoints are somewhat off."""
    x, y, w, h = entry["bbox"]
    points = np.array(entry["keypoints"], float).reshape(-1, 3)[:, :2] + 0.5 + moved
    points = np.concatenate([points, np.full((len(points), 1), 0.5)], 1).tolist()
    return coco_result(entry["image_id"], entry["category_id"], [x, y, x + w, y + h], score, keypoints=points)


def scattered(seed, images=12):
    """Random objects, some hidden, crowds or without keypoints, and results that fit them more or less."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(10, 10 * images + 1, 10):
        for _ in range(rng.integers(0, 5)):
            box = [*rng.integers(0, 30, 2).tolist(), *rng.integers(8, 40, 2).tolist()]
            entry = pointed(image, int(rng.choice([3, 7])), box, iscrowd=int(rng.random() < 0.1))
            entry["keypoints"][2::3] = rng.choice([0, 1, 2], 4).tolist() if rng.random() < 0.8 else [0] * 4
            entry["num_keypoints"] = sum(v > 0 for v in entry["keypoints"][2::3])
            annotations.append(entry)
            for _ in range(rng.integers(0, 3)):
                results.append(found(entry, rng.normal(0, 2, (4, 2)), float(rng.random())))
    return annotations, results


@pytest.mark.parametrize("seed", range(3))
def test_numbers_equal_pycocotools_on_the_written_files(tmp_path, seed):
    annotations, results = scattered(seed)
    listing = listing_of(tmp_path, pointed_content(annotations, images=12))
    result = keypoint_metric(listing, SIGMAS).evaluate(results, [10 * i for i in range(1, 13)])
    result.write(tmp_path / "out", picture=False)
    with contextlib.redirect_stdout(io.StringIO()):
        original = COCO(str(tmp_path / "annotations" / "instances_train.json"))
        for kind, name in (("box", "bbox"), ("keypoints", "keypoints")):
            plain = COCOeval(original, original.loadRes(str(tmp_path / "out" / f"results_{kind}.json")), name)
            plain.params.kpt_oks_sigmas = np.array(SIGMAS)
            plain.evaluate()
            plain.accumulate()
            plain.summarize()
            expected = [math.nan if v < 0 else v for v in plain.stats.tolist()]
            assert np.array_equal([result.kinds[kind][n] for n in KINDS[kind].numbers], expected, equal_nan=True)
            assert 0 < result.kinds[kind]["AP"] < 1
    again = DetectionEvaluation.read(tmp_path / "out")
    assert again.keypoints == pytest.approx(result.keypoints, nan_ok=True) and list(again.kinds) == ["box", "keypoints"]
    assert DetectionEvaluation.of_json(result.to_json()).keypoints == pytest.approx(result.keypoints, nan_ok=True)


def test_a_distance_counts_by_size_and_sigma(tmp_path):
    """OKS is exp(-d^2 / (8 sigma^2 area)), for all keypoints alike: here .8, so right at .5, .55 ... .75."""
    entry = pointed(10, 3, BOX)
    off = math.sqrt(-math.log(0.79) * 8 * 0.05**2 * 24 * 24)
    listing = listing_of(tmp_path, pointed_content([entry]))
    result = keypoint_metric(listing, [0.05] * 4).evaluate([found(entry, [off, 0], 0.9)], [10])
    assert result.keypoints["AP"] == pytest.approx(0.6) and result.image_scores == {10: 1.0}
    assert result.headline().endswith("keypoints AP 60.0 (AP50 100.0, AP75 100.0)")
    assert result.metrics()["keypoints_ap"] == result.keypoints["AP"]
    strict = keypoint_metric(listing, [0.01] * 4).evaluate([found(entry, [off, 0], 0.9)], [10])
    assert strict.keypoints["AP"] == 0 and strict.box["AP"] == pytest.approx(1) and strict.image_scores == {10: 0.0}
    table = result.table().splitlines()
    assert len(table) == 4 and "ARs" in table[0] and "ARs" not in table[2] and "60.0" in table[3]
    text = report("sgformer_n", result, {}, [])
    assert "box AP 100.0, keypoints AP 60.0" in text and "| keypoints | 60.0 |" in text and "keypoints AR |" in text


# -- settings ---------------------------------------------------------------------------------------------------------


def test_flips_follow_from_the_names():
    sides, none = Skeleton(tuple(POINTS["keypoints"])), Skeleton(("top", "bottom"))
    assert flips(config(), sides) == (0.5, [0, 2, 1, 3], "")
    assert flips(config(hflip=0.0), sides)[0] == 0
    chance, order, note = flips(config(), none)
    assert (chance, order) == (0, [0, 1]) and "no keypoint's name has a side" in note
    assert flips(config(hflip=0.3), none) == (0.3, [0, 1], "")
    assert flips(config(flip_pairs=["top:bottom"]), none) == (0.5, [1, 0], "")
    half = Skeleton(("left_eye", "nose"))
    assert flips(config(), half)[0] == 0 and "left_eye" in flips(config(), half)[2]
    with pytest.raises(UserError, match=r"--hflip 0.5: keypoints have a side and no twin.*left_eye.*--flip-pairs"):
        flips(config(hflip=0.5), half)


def test_sigmas_are_coco_s_for_its_persons():
    assert sigmas_of(config(), Skeleton(PERSON)) == Params("keypoints").kpt_oks_sigmas.tolist()
    four = Skeleton(tuple(POINTS["keypoints"]))
    assert sigmas_of(config(), four) == [SIGMA] * 4 and sigmas_of(config(sigmas=0.1), four) == [0.1] * 4
    assert sigmas_of(config(sigmas=[0.1, 0.2, 0.3, 0.4]), four) == [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(UserError, match="2 of them for 4 keypoints"):
        sigmas_of(config(sigmas=(0.1, 0.2)), four)


@pytest.mark.parametrize("options", [{"sigmas": 0}, {"sigmas": (0.1, 2)}, {"hflip": 1.5}, {"rois": 0}])
def test_settings_that_make_no_sense_are_named(options):
    with pytest.raises(UserError, match=f"--{next(iter(options))} must be"):
        KeypointsConfig(**options)


def test_the_data_of_a_run(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path, pointed_content([pointed(10, 3, BOX), pointed(20, 7, BOX)]), split)
    splits = open_data(config(data=str(tmp_path)), None, 2, 0, 1)
    about = dict(splits.metadata)
    assert about["task"] == "keypoints" and about["sigmas"] == [SIGMA] * 4
    assert (about["keypoints"], about["skeleton"]) == (POINTS["keypoints"], POINTS["skeleton"])
    assert splits.train[0].target["keypoints"].shape == (1, 4, 3)
    other = pointed_content([pointed(10, 3, BOX)])
    for category in other["categories"]:
        category["keypoints"] = ["nose", "left_eye", "right_eye", "chin"]
    write_coco(tmp_path, other, "val")
    with pytest.raises(UserError, match=r"instances_val\.json.*not those of training: number 4 is chin, not tail"):
        read_listings(config(data=str(tmp_path)), None)
    write_coco(tmp_path, pointed_content([thing(10, 3, BOX)]), "val")
    with pytest.raises(UserError, match=r"instances_val\.json: no object has a labelled keypoint"):
        read_listings(config(data=str(tmp_path)), None)


def test_formats_without_keypoints_are_refused(tmp_path, monkeypatch):
    from sgformer.data import formats

    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    sgformer.register_format("mine", "objects", lambda root: True, print)
    with pytest.raises(UserError, match="its format, mine, has no keypoints"):
        read_listings(config(data=str(tmp_path)), None)


# -- the network ------------------------------------------------------------------------------------------------------


def test_keypoints_refer_to_the_size_asked_for():
    model, image = small().eval(), torch.rand(3, 40, 64)
    model.heads.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        own, twice = model([image])[0], model([image], sizes=[(80, 192)])[0]
    assert torch.allclose(twice["keypoints"], own["keypoints"] * torch.tensor([3.0, 2, 1]))


def test_weights_come_back_and_start_others(tmp_path, caplog):
    model, path = small().eval(), tmp_path / "w.safetensors"
    model.heads.roi_heads.score_thresh = 0.0
    about = {"classes": ["cat", "dog"], "category_ids": [3, 7], "image_size": 64, **POINTS, "sigmas": SIGMAS}
    model.save(path, about)
    again = sgformer.load_model(path)
    again.heads.roi_heads.score_thresh = 0.0
    assert type(again) is KeypointDetector and again.metadata["task"] == "keypoints"
    x = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        for key, value in model(x)[0].items():
            assert torch.equal(value, again(x)[0][key])
    weights = read_weights(path)
    same = new_keypoint_detector(config(), 4, weights, ["cat", "dog"]).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    with caplog.at_level("INFO", "sgformer"):
        other = new_keypoint_detector(config(), 6, weights, ["cat", "dog"]).state_dict()
    fresh = {name for name, value in model.state_dict().items() if not torch.equal(value, other[name][: len(value)])}
    assert "start afresh" in caplog.text and all("kps_score_lowres" in name for name in fresh)
    from sgformer.tasks.detect.config import DetectConfig
    from sgformer.tasks.detect.network import new_detector

    boxes = new_detector(DetectConfig(**QUICK).resolved(), 2, False, weights).state_dict()  # takes the backbone
    name = "backbone.network.stages.0.blocks.0.mlp.fc1.weight"
    assert torch.equal(boxes[name], same[name])


def test_weights_with_other_keypoints_than_the_data_are_refused(tmp_path):
    write_coco(tmp_path, pointed_content([pointed(10, 3, BOX)]), "val")
    about = {"classes": ["cat", "dog"], "category_ids": [3, 7], "image_size": 64, "sigmas": [0.1] * 4, "skeleton": []}
    small().save(tmp_path / "w.safetensors", {**about, "keypoints": ["a", "b", "c", "d"]})
    with pytest.raises(UserError, match=r"not those of .*w\.safetensors: number 1 is nose, not a"):
        sgformer.evaluate(tmp_path / "w.safetensors", tmp_path, workers=0)


def test_results_are_annotations_that_are_read_again(tmp_path):
    entry = pointed(10, 3, BOX)
    first = {**found(entry, 0, 0.9), "class": "cat"}
    assert first["keypoints"] == [v for x, y, _ in np.reshape(entry["keypoints"], (-1, 3)) for v in (x, y, 0.5)]
    detections = [sgformer.results.Detections("10.png", [first], (48, 64))]
    told = as_coco(detections, [3, 7], ["cat", "dog"], POINTS)
    assert told["categories"][0] == {"id": 3, "name": "cat", **POINTS}
    (one,) = told["annotations"]
    assert one["keypoints"][2::3] == [2] * 4 and one["keypoint_scores"] == [0.5] * 4 and one["num_keypoints"] == 4
    write_coco(tmp_path, pointed_content([entry]))
    (tmp_path / "p.json").write_text(json.dumps(told))
    again = read_coco(tmp_path / "p.json", tmp_path / "train", keypoints=True)
    assert again.keypoints_of(0)[0, :, :2].tolist() == np.reshape(entry["keypoints"], (-1, 3))[:, :2].tolist()
    assert "keypoints" not in as_coco([], [3, 7], ["cat", "dog"])["categories"][0]


@pytest.mark.slow
def test_it_learns_its_images_by_heart(tmp_path):
    torch.manual_seed(0)
    things = [pointed(10, 3, BOX), pointed(10, 7, [36, 10, 20, 30]), pointed(20, 7, [10, 8, 30, 30])]
    listing = listing_of(tmp_path, pointed_content(things))
    settings = config(epochs=80, lr=3e-2, lr_drops=(64,), opt="muon", image_size=96, head_width=32, rois=64)
    model = new_keypoint_detector(settings, 4, None, listing.classes)
    ids = [image.id for image in listing.images]
    metric = keypoint_metric(listing, [0.1] * 4)
    task = DetectionModule(model, settings, metric=metric, image_ids=ids, category_ids=listing.own_ids)

    def loader(train):
        transform = train_transform(96, False, 0.0, range(4)) if train else eval_transform(96)
        dataset = CocoDataset(listing, transform, objects=train)
        sampler = EpochSampler(len(dataset), 2, train=train)
        return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)

    with quiet():
        trainer = build_trainer(max_epochs=80, device="cpu", gradient_clip_val=1.0)
        trainer.fit(task, loader(True))
        trainer.validate(task, loader(False), verbose=False)
    assert task.monitor == "keypoints_ap" and task.result.keypoints["AP50"] > 0.9
