import json

import lightning as L
import numpy as np
import pytest
import torch
from coco_scene import content, thing, write_coco
from PIL import Image
from torchvision import tv_tensors

pytest.importorskip("pycocotools")

import sgformer
from sgformer.core.errors import UserError
from sgformer.data.coco import CocoDataset, collate, ground_truth, read_coco, vanishing
from sgformer.data.detection_transforms import eval_transform, train_transform
from sgformer.data.imagefolder import EpochSampler
from sgformer.models.load import read_weights
from sgformer.models.pyramid import pyramid_backbone
from sgformer.results import coco_result
from sgformer.tasks.detect import predict
from sgformer.tasks.detect.config import DetectConfig
from sgformer.tasks.detect.data import late_drops, open_data, read_splits, without_objects
from sgformer.tasks.detect.metrics import CocoMetric
from sgformer.tasks.detect.module import DetectionModule, Detector, coco_results, new_detector
from sgformer.training.trainer import build_trainer, quiet

QUICK = {"model": "sgformer_n", "image_size": 64, "batch_size": 2, "head_width": 16, "rois": 16, "drop_path": 0.0}


def config(**more):
    return DetectConfig(**{**QUICK, **more}).resolved()


def started(settings, *shape):
    """The network that a run with these settings begins with."""
    return new_detector(settings, *shape, read_weights(settings.weights, settings.model) if settings.weights else None)


def small(name="sgformer_n", classes=2, masks=True):
    return Detector(pyramid_backbone(name), classes, masks, width=16, rois=16)


def certain(model):
    """Let everything through the score threshold."""
    model.eval().heads.roi_heads.score_thresh = 0.0
    return model


@pytest.fixture
def listing(tmp_path):
    annotations = [thing(10, 3, [4, 4, 24, 24]), thing(10, 7, [36, 10, 20, 30]), thing(20, 7, [10, 8, 30, 30])]
    return read_coco(write_coco(tmp_path, content(annotations, images=4)), tmp_path / "train")


def task_of(model, listing, settings, **more):
    metric = CocoMetric(ground_truth(listing), listing.classes, listing.own_ids, listing.has_masks)
    ids = [image.id for image in listing.images]
    return DetectionModule(model, settings, metric=metric, image_ids=ids, category_ids=listing.own_ids, **more)


def loader(listing, settings, train):
    transform = train_transform(settings.image_size, settings.multi_scale) if train else eval_transform(64)
    dataset = CocoDataset(listing, transform, objects=train)
    sampler = EpochSampler(len(dataset), settings.batch_size, train=train)
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)


@pytest.mark.parametrize("masks", [True, False])
def test_training_logs_every_loss_and_ap(tmp_path, masks):
    more = {} if masks else {"segmentation": []}
    file = write_coco(tmp_path, content([thing(10, 3, [4, 4, 24, 24], **more)], images=3))
    listing = read_coco(file, tmp_path / "train")
    settings = config(epochs=1)
    task = task_of(started(settings, 2, listing.has_masks), listing, settings)
    parts = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, task, outputs, *_):
            parts.append((outputs["loss"], outputs["parts"]))

    with quiet():
        trainer = build_trainer(max_epochs=1, device="cpu", callbacks=[Watch()])
        trainer.fit(task, loader(listing, settings, True), loader(listing, settings, False))
    loss, named = parts[0]
    assert len(named) == (5 if masks else 4) and loss == pytest.approx(sum(named.values()).item())
    assert task.monitor == ("mask_ap" if masks else "box_ap") and task.monitor in trainer.callback_metrics
    assert sorted(task.seen) == [0, 1, 2] and task.result.images == 3


@pytest.mark.slow
def test_it_learns_its_images_by_heart(listing):
    torch.manual_seed(0)
    more = {"image_size": 96, "head_width": 32, "rois": 64, "hflip": 0.0}
    settings = config(epochs=60, lr=3e-2, lr_drops=(48,), opt="muon", **more)
    task = task_of(started(settings, 2, True), listing, settings)
    with quiet():
        trainer = build_trainer(max_epochs=60, device="cpu", gradient_clip_val=1.0)
        trainer.fit(task, loader(listing, settings, True))
        trainer.validate(task, loader(listing, settings, False), verbose=False)
    assert task.result.box["AP50"] > 0.9 and task.result.mask["AP50"] > 0.9


def test_a_batch_is_its_images():
    model = certain(small())
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    with torch.no_grad():
        both = model(images)
        for i, image in enumerate(images):
            alone = model([image])[0]
            assert torch.allclose(alone["boxes"][:5], both[i]["boxes"][:5], atol=1e-3)
            assert torch.allclose(alone["scores"][:5], both[i]["scores"][:5], atol=1e-5)


def test_boxes_refer_to_the_size_asked_for():
    model = certain(small())
    image = torch.rand(3, 40, 64)
    with torch.no_grad():
        own, twice = model([image])[0], model([image], sizes=[(80, 192)])[0]
    assert torch.allclose(twice["boxes"], own["boxes"] * torch.tensor([3.0, 2, 3, 2]))
    assert twice["boxes"][:, 2].max() <= 192 and twice["boxes"][:, 3].max() <= 80


def test_images_are_normalised_then_padded_with_zeros_to_32():
    batch = small().batch([torch.ones(3, 33, 64), torch.zeros(3, 20, 70)])
    assert batch.shape == (2, 3, 64, 96)
    assert torch.allclose(batch[0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4)
    assert not batch[0, :, 33:].any() and not batch[0, :, :, 64:].any() and not batch[1, :, 20:].any()


@pytest.mark.parametrize(("name", "masks"), [("sgformer_n", True), ("pvt_v2_b0", False)])
def test_weights_come_back(tmp_path, name, masks):
    model = certain(small(name, masks=masks))
    path = tmp_path / "w.safetensors"
    model.save(path, {"classes": ["a", "b"]})
    again = sgformer.load_model(path)
    metadata = again.metadata
    certain(again)
    assert metadata["classes"] == ["a", "b"] and metadata["task"] == "detect"
    x = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        for key, value in model(x)[0].items():
            assert torch.equal(value, again(x)[0][key])


def test_a_detector_goes_on_with_other_classes(tmp_path):
    path = tmp_path / "w.safetensors"
    model = small()
    model.save(path, {})
    same = started(config(weights=str(path)), 2, True).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    other = started(config(weights=str(path)), 5, True)
    held = model.state_dict()
    fresh = {
        name for name, value in other.state_dict().items() if not (name in held and value.shape == held[name].shape)
    }
    assert fresh and all("predictor" in name for name in fresh)
    assert torch.equal(other.heads.fpn.inner_blocks[0][0].weight, model.heads.fpn.inner_blocks[0][0].weight)
    boxes = started(config(weights=str(path)), 2, False)
    assert not boxes.masks
    with pytest.raises(UserError, match="holds sgformer_n, not --model sgformer_t"):
        started(config(weights=str(path), model="sgformer_t"), 2, True)


def test_heads_of_other_classes_start_afresh(tmp_path, caplog):
    caplog.set_level("INFO", "sgformer")
    path = tmp_path / "d.safetensors"
    before = small()
    before.save(path, {"classes": ["cat", "dog"], "category_ids": [3, 7], "image_size": 64})
    weights, settings = read_weights(path), config()
    same, own = new_detector(settings, 2, True, weights, ["cat", "dog"]).state_dict(), before.state_dict()
    assert all(torch.equal(same[name], own[name]) for name in own) and not caplog.messages
    for classes in (["cat", "cow"], ["dog", "cat"]):
        caplog.clear()
        other = new_detector(settings, 2, True, weights, classes).state_dict()
        fresh = {name for name in own if not torch.equal(other[name], own[name])}
        assert fresh and all("predictor" in name or "mask" in name for name in fresh)
        assert "backbone.network.stages.0.blocks.0.mlp.fc1.weight" not in fresh
        assert len(caplog.messages) == 1 and "what there is for each class starts afresh" in caplog.messages[0]
    assert "the classes are in another order: dog, cat" in caplog.messages[0]


def test_tensors_that_do_not_fit_are_said_or_refused(tmp_path, caplog):
    path = tmp_path / "w.safetensors"
    small().save(path, {})
    with caplog.at_level("INFO", "sgformer"):
        started(config(weights=str(path)), 2, True)
        assert not caplog.messages
        started(config(weights=str(path)), 5, True)
        assert "tensors start afresh, as their shape differs or they are new: heads." in caplog.messages[0]
        started(config(weights=str(path)), 2, False)
        assert "tensors are left out, as the network has none of the name: heads.roi_heads.mask" in caplog.messages[1]
    with pytest.raises(UserError, match="heads of width 16, not 32: pass --head-width 16"):
        started(config(weights=str(path), head_width=32), 2, True)


def test_objects_below_a_pixel_are_counted_by_class(tmp_path):
    boxes = [thing(10, 3, [4, 4, 24, 24]), thing(20, 7, [9, 9, 0.9, 9]), thing(20, 3, [9, 9, 2, 0.4])]
    listing = read_coco(write_coco(tmp_path, content(boxes)), tmp_path / "train", masks=False)  # 64 x 48 pixels
    counted = ["instances_train.json: 2 objects are smaller than a pixel at 48x80 and not trained on: dog 1, cat 1"]
    assert vanishing(listing, 48) == [f"{counted[0]}; nothing is left of dog"]
    kept = [len(CocoDataset(listing, train_transform(48, False, 0.0))[i].target["boxes"]) for i in range(2)]
    assert kept == [1, 0]  # as the transform does
    assert "1 object is smaller" in vanishing(listing, 96)[0] and vanishing(listing, 480) == []
    tiny = read_coco(write_coco(tmp_path, content(boxes[1:])), tmp_path / "train", masks=False)
    with pytest.raises(UserError, match=r"all 2 objects are smaller than a pixel.*are the boxes in pixels\?"):
        vanishing(tiny, 48)


def test_data_check_counts_objects_below_a_pixel(tmp_path):
    from sgformer.data.checks import check_data

    boxes = [thing(10, 3, [4, 4, 24, 24]), thing(20, 7, [9, 9, 0.9, 9]), thing(20, 3, [9, 9, 2, 0.4])]
    write_coco(tmp_path, content(boxes))
    report = check_data(tmp_path)
    said = "instances_train.json: 2 objects are smaller than a pixel of their images and not trained on: dog 1, cat 1"
    assert f"{said}; nothing is left of dog" in report.notes
    write_coco(tmp_path, content(boxes[1:]))
    assert any(
        "all 2 objects are smaller" in line and line.endswith("in pixels?") for line in check_data(tmp_path).problems
    )


def test_no_truth_is_an_error_and_absent_classes_are_named(tmp_path):
    for split, boxes in (("train", [thing(10, 3, [4, 4, 24, 24])]), ("val", [thing(10, 3, [4, 4, 9, 9], iscrowd=1)])):
        write_coco(tmp_path, content(boxes), split)
    with pytest.raises(UserError, match=r"instances_val\.json: no objects to validate on, so there is no AP"):
        open_data(config(data=str(tmp_path)), None, 2, 0, 1)
    write_coco(tmp_path, content([thing(10, 3, [4, 4, 9, 9])]), "val")
    assert without_objects(read_splits(config(data=str(tmp_path)))[1]) == [
        "instances_val.json: 1 of 2 classes has no object: dog"
    ]
    small().save(tmp_path / "w.safetensors", {"classes": ["cat", "dog"], "category_ids": [3, 7], "image_size": 64})
    write_coco(tmp_path, content([]), "val")
    with pytest.raises(UserError, match="no objects to validate on"):
        sgformer.evaluate(tmp_path / "w.safetensors", tmp_path, workers=0)


def test_drops_beyond_the_run_are_said():
    assert late_drops(DetectConfig().resolved()) == []
    assert late_drops(DetectConfig(epochs=10).resolved()) == [
        "the run ends with epoch 10, before the rate falls after 11 (--lr-drops)"
    ]


def test_with_a_frozen_backbone_the_heads_learn():
    task = DetectionModule(small(), config())
    task.freeze_backbone()
    task.train()
    learns = {name.split(".")[0] for name, p in task.model.named_parameters() if p.requires_grad}
    assert learns == {"heads"} and all(p.requires_grad for p in task.model.heads.parameters())
    assert task.model.heads.training and not any(m.training for m in task.model.backbone.network.stages.modules())
    with pytest.raises(UserError, match="leave out --freeze-stages"):
        config(freeze=True, freeze_stages=1)


def test_the_rate_warms_up_and_drops():
    settings = DetectConfig(lr_drops=(8, 11)).resolved()
    rate = [settings.rate(step, 7000, 84000) for step in (0, 500, 1000, 55999, 56000, 76999, 77000)]
    assert rate == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
    assert DetectConfig(batch_size=4).scaled(1e-4) == pytest.approx(0.25e-4)
    short = [settings.rate(step, 1, 12) for step in (0, 1)]  # a tenth of twelve steps, not a thousand
    assert short == pytest.approx([0.001, 1])


def test_the_rate_reaches_the_optimiser(listing):
    settings = config(epochs=3, lr_drops=(2,), warmup_steps=2, warmup_factor=0.5)
    task = task_of(small(), listing, settings)
    rates = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, task, *_):
            rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})

    with quiet():
        build_trainer(max_epochs=3, device="cpu", callbacks=[Watch()]).fit(task, loader(listing, settings, True))
    peak = 1e-4 * 2 / 16
    assert [r.pop() / peak for r in rates] == pytest.approx([0.5, 0.75, 1, 1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_drops": (0,)}, "--lr-drops"),
        ({"image_size": (800, 400)}, r"\[SHORT,LONGEST\]"),
        ({"freeze_stages": 5}, "--freeze-stages"),
        ({"rois": 0}, "--rois must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(options, words):
    with pytest.raises(UserError, match=words):
        DetectConfig(**options)


def test_results_are_in_the_file_s_own_terms():
    found = {
        "boxes": torch.tensor([[1.0, 2, 11, 22], [0, 0, 4, 4]]),
        "labels": torch.tensor([1, 0]),
        "scores": torch.tensor([0.5, 0.25]),
        "masks": torch.ones(2, 1, 28, 28),
    }
    (result,) = coco_results(found, "img", [None, 7], (40, 30))
    assert (result["image_id"], result["category_id"], result["bbox"], result["score"]) == (
        "img",
        7,
        [1, 2, 10, 20],
        0.5,
    )
    from pycocotools import mask

    assert result["segmentation"]["size"] == [40, 30]
    assert abs(int(mask.area(result["segmentation"])) - 200) <= 60


@pytest.mark.parametrize("size", [(8000, 8), (8, 8000), (1, 1)])
def test_elongated_images_are_detected_on(size, tmp_path):
    """No side is scaled away: 8,000 x 8 pixels become 53 x 1, not 53 x 0."""
    metadata = {"classes": ["a", "b"], "category_ids": [1, 2], "image_size": 32, "model": "sgformer_n"}
    detector = Detector(pyramid_backbone("sgformer_n"), 2, masks=True, width=8)
    detector.save(tmp_path / "d.safetensors", metadata)
    (found,) = sgformer.predict(tmp_path / "d.safetensors", Image.new("RGB", size), score=0.05)
    assert found.size == size[::-1]
    for result in found.results:
        assert result["segmentation"]["size"] == list(found.size)
    boxes = tv_tensors.BoundingBoxes([[0, 0, *size]], format="XYXY", canvas_size=size[::-1])  # type: ignore[call-overload]
    target = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}
    for multi_scale in (False, True):
        assert min(train_transform(32, multi_scale)(Image.new("RGB", size), target)[0].shape[-2:]) >= 1


def test_examples_of_large_photographs_are_drawn_small(listing, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("sgformer.viz.detection.draw_examples", lambda best, worst, *_: drawn.extend([*best, *worst]))
    monkeypatch.setattr(predict, "SIDE", 32)  # images are 64 x 48
    results = [coco_result(10, 3, [4.0, 4.0, 28.0, 28.0], 0.9, np.ones((48, 64), np.uint8))]
    for kind in ("box", "mask"):
        (tmp_path / f"results_{kind}.json").write_text(json.dumps(results))
    monkeypatch.setattr("sgformer.tasks.detect.metrics.read_image_scores", lambda _: {"10": 0.5, "20": 0.25})
    predict.draw_examples(tmp_path, listing)
    first, second = drawn
    assert first.image.shape == second.image.shape == (24, 32, 3)
    assert first.truth.boxes.tolist() == [[2, 2, 14, 14], [18, 5, 28, 20]] and first.truth.labels.tolist() == [0, 1]
    assert first.truth.masks.shape == (2, 24, 32) and first.truth.masks[0].sum() == 12 * 12
    assert first.detected.boxes.tolist() == [[2, 2, 14, 14]] and first.detected.masks.all()
    assert second.detected.masks is None and len(second.detected.boxes) == 0
