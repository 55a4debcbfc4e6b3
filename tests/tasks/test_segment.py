"""Numbers on scenes solved by hand; inference that covers, averages and mirrors as it says; weights that come back."""

import dataclasses
import itertools
import json
import weakref

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

import sgformer
from sgformer.core.errors import UserError
from sgformer.data.preparing import Normalization
from sgformer.models.load import read_weights
from sgformer.models.pyramid import pyramid_backbone
from sgformer.tasks.segment import module, network, predict
from sgformer.tasks.segment.config import SegmentConfig
from sgformer.tasks.segment.metrics import SegmentationEvaluation
from sgformer.tasks.segment.module import SegmentationModule
from sgformer.tasks.segment.network import (
    MULTI_SCALE,
    InferenceSettings,
    Segmenter,
    _spans,
    class_probabilities,
    new_segmenter,
    slide,
)

HEADS = ("semantic-fpn", "upernet")


class Pointwise(nn.Module):
    """A stand-in network whose logits are a linear map of each pixel's colour."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape[-2:]))
        return {"out": self.conv(images)}


def started(settings, classes):
    """The network that a run with these settings begins with."""
    return new_segmenter(
        settings, classes, read_weights(settings.weights, settings.model) if settings.weights else None
    )


def small(head="semantic-fpn", classes=3, name="sgformer_n"):
    return Segmenter(pyramid_backbone(name), head, classes)


@pytest.mark.parametrize("head", ["semantic-fpn", "upernet"])
def test_heads_of_other_classes_start_afresh(tmp_path, caplog, head):
    caplog.set_level("INFO", "sgformer")
    path = tmp_path / "s.safetensors"
    before = Segmenter(pyramid_backbone("sgformer_n"), head, 2, 16)
    before.save(path, {"classes": ["road", "sky"]})
    settings = SegmentConfig(model="sgformer_n", head=head, head_width=16).resolved()
    weights, own = read_weights(path), before.state_dict()
    same = new_segmenter(settings, 2, weights, ["road", "sky"]).state_dict()
    assert all(torch.equal(same[name], own[name]) for name in own) and not caplog.messages
    other = new_segmenter(settings, 2, weights, ["sky", "road"]).state_dict()
    fresh = [name for name in own if not torch.equal(other[name], own[name])]
    assert fresh and all(len(own[name]) == 2 for name in fresh)
    assert len(caplog.messages) == 1 and "another order: sky, road instead of road, sky" in caplog.messages[0]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_of_a_scene_solved_by_hand():
    # Rows are true, columns predicted; class 3 is neither there nor predicted, class 2 is predicted but not there.
    counts = np.array([[6, 2, 0, 0], [1, 3, 4, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = SegmentationEvaluation(counts, 0.5, 1, ("a", "b", "c", "d"))
    assert np.allclose(result.iou, [6 / 9, 3 / 10, 0, np.nan], equal_nan=True)
    assert np.allclose(result.accuracy, [6 / 8, 3 / 8, np.nan, np.nan], equal_nan=True)
    assert result.miou == pytest.approx((6 / 9 + 3 / 10 + 0) / 3)
    assert result.macc == pytest.approx((6 / 8 + 3 / 8) / 2)
    assert result.pixel_accuracy == pytest.approx(9 / 16)
    assert [row["taken_for"] for row in result.per_class()] == ["b", "c", "", ""]


def test_evaluation_survives_writing(tmp_path):
    counts = np.array([[5, 1], [0, 0]])
    result = SegmentationEvaluation(counts, 0.25, 3, ("a, b", 'c "d"'), ("x.png: cut",))
    result.write(tmp_path, picture=False)
    again = SegmentationEvaluation.read(tmp_path)
    assert np.array_equal(again.confusion, counts) and again.summary() == result.summary()
    assert again.class_names == result.class_names
    assert json.loads((tmp_path / "metrics.json").read_text())["miou"] == pytest.approx(5 / 12)
    assert (tmp_path / "classes.csv").read_text().splitlines()[0] == "class,pixels,iou,accuracy,taken_for"


def run_validation(task, batches):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(task, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_validation_equals_counting_pixels_by_hand():
    """Images of several sizes in one batch, pixels without a class, an image with none at all."""
    task = SegmentationModule(Pointwise(), SegmentConfig(image_size=40), class_names=("a", "b", "c"))
    torch.manual_seed(1)
    sizes = [(40, 48), (64, 40), (40, 48), (33, 90)]
    images = [torch.randn(3, *size) for size in sizes]
    targets = [torch.randint(0, 3, size) for size in sizes]
    for target in targets:
        target[:5] = 255
    targets[3][:] = 255
    batches = [(images[:3], targets[:3], torch.arange(3), ()), (images[3:], targets[3:], torch.arange(1), ())]
    trainer = run_validation(task, batches)

    counts, losses = np.zeros((3, 3), dtype=int), []
    jaccard = torchmetrics.classification.MulticlassJaccardIndex(3, ignore_index=255)
    for image, target in zip(images, targets, strict=True):
        with torch.no_grad():
            shares = class_probabilities(task.model, image[None], InferenceSettings(40))
        guess = shares.argmax(1)
        jaccard.update(guess, target[None])
        for true, predicted in zip(target.flatten().tolist(), guess.flatten().tolist(), strict=True):
            if true != 255:
                counts[true, predicted] += 1
        known = target != 255
        losses.extend(-shares[0].gather(0, target.clamp(max=2)[None])[0][known].log())
    assert np.array_equal(task.result.confusion, counts) and task.result.images == 4
    hits = np.diag(counts)
    miou = (hits / (counts.sum(0) + counts.sum(1) - hits)).mean()
    assert trainer.callback_metrics["miou"].item() == pytest.approx(miou) == pytest.approx(jaccard.compute().item())
    assert trainer.callback_metrics["pixel_accuracy"].item() == pytest.approx(hits.sum() / counts.sum())
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_loss_is_the_mean_over_pixels_with_a_class():
    task = SegmentationModule(Pointwise())
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    targets = torch.randint(0, 3, (2, 4, 4))
    targets[0] = 255
    expected = nn.functional.cross_entropy(logits[1:], targets[1:])
    assert torch.allclose(task.pixel_loss(logits, targets), expected)
    nothing = task.pixel_loss(logits, torch.full_like(targets, 255))
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()


def test_auxiliary_loss_has_its_weight():
    model = small("upernet").train()
    batch = (torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)))
    losses = {}
    for weight in (0.0, 0.4, 1.0):
        torch.manual_seed(0)
        losses[weight] = SegmentationModule(model, SegmentConfig(auxiliary=weight)).training_step(batch, 0).item()
    auxiliary = losses[1.0] - losses[0.0]
    assert auxiliary > 0.1 and losses[0.4] == pytest.approx(losses[0.0] + 0.4 * auxiliary, rel=1e-5)


# -- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("power", "warmup"), [(0.9, 0), (1.0, 15)])
def test_rate_follows_the_polynomial_over_steps(power, warmup):
    config = SegmentConfig(lr=1e-2, batch_size=8, steps=100, power=power, warmup_steps=warmup)
    parts = SegmentationModule(small(), config).configure_optimizers()
    scheduler, group = parts["lr_scheduler"]["scheduler"], parts["optimizer"].param_groups[0]
    for step in (0, 5, 15, 50, 99, 100):
        scheduler.step_update(step)
        peak = 1e-2 * 8 / 16
        expected = peak * (1 - (step - warmup) / (100 - warmup)) ** power if step >= warmup else 0
        if step < warmup:
            expected = peak * step / warmup
        assert group["lr"] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_norms_and_position_table_do_not_decay():
    model = small("upernet")
    optimizer = SegmentationModule(model, SegmentConfig(weight_decay=0.01)).configure_optimizers()["optimizer"]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = "norm" in name or "position" in name
        assert decays[id(parameter)] == (0 if exempt else 0.01), name
    assert any("position" in name for name, _ in model.named_parameters())


# -- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "side"), [(10, 20), (20, 20), (21, 20), (100, 30), (96, 32)])
def test_windows_cover_and_end_flush(length, side):
    spans = _spans(length, side)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(end - start == min(side, length) for start, end in spans)
    assert all(b[0] <= a[1] and a[0] < b[0] for a, b in itertools.pairwise(spans))
    assert len(set(spans)) == len(spans)


def test_sliding_gives_each_pixel_its_mean_over_windows():
    images, model = torch.randn(2, 3, 50, 71), Pointwise()
    with torch.no_grad():
        assert torch.allclose(slide(model, images, (32, 40)), model(images)["out"], atol=1e-6)
        assert len(model.seen) > 4 and set(model.seen[:-1]) == {(32, 40)}

    class Corner(nn.Module):
        """Says 1 in its window's first column, else 0."""

        def forward(self, x):
            out = torch.zeros(1, 1, *x.shape[-2:])
            out[..., 0] = 1
            return {"out": out}

    # Windows of 6 start at 0, 4 and 6: two windows see columns 4 to 9.
    seen = slide(Corner(), torch.zeros(1, 3, 6, 12), (6, 6))[0, 0, 0].tolist()
    assert seen == [1, 0, 0, 0, 0.5, 0, pytest.approx(0.5), 0, 0, 0, 0, 0]


def test_scales_and_mirror_images_are_averaged_as_probabilities():
    model, images = Pointwise(), torch.randn(1, 3, 64, 80)
    how = InferenceSettings(short_side=64, scales=(0.5, 1.0), flip=True)
    shares = class_probabilities(model, images, how)
    assert model.seen == [(32, 40), (32, 40), (64, 80), (64, 80)]
    with torch.no_grad():
        low = nn.functional.interpolate(images, (32, 40), mode="bilinear", antialias=True)
        up = nn.functional.interpolate(model.conv(low), (64, 80), mode="bilinear")
        # A pixelwise network is blind to mirroring, so both directions agree.
        expected = (up.softmax(1) + model.conv(images).softmax(1)) / 2
    assert torch.allclose(shares, expected, atol=1e-5)
    assert torch.allclose(shares.sum(1), torch.ones(1, 64, 80), atol=1e-5)
    assert MULTI_SCALE == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def test_mirrored_logits_are_turned_back():
    class Left(nn.Module):
        """Sees class 1 in the left half of whatever it is shown."""

        def forward(self, x):
            out = torch.zeros(1, 2, *x.shape[-2:])
            out[:, 1, :, : x.shape[-1] // 2] = 50
            return {"out": out}

    shares = class_probabilities(Left(), torch.zeros(1, 3, 32, 32), InferenceSettings(32, flip=True))
    # Where it says 1 looking straight it says "either" looking at the mirror, and the other way round.
    assert torch.allclose(shares[0, 1], torch.full((32, 32), 0.75), atol=1e-4)


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["sgformer_n", "pvt_v2_b0"])
def test_weights_come_back_to_the_bit(tmp_path, head, name):
    model = small(head, 4, name).eval()
    model.save(tmp_path / "w.safetensors", {"classes": ["a", "b", "c", "d"]})
    again = sgformer.load_model(tmp_path / "w.safetensors")
    metadata = again.metadata
    assert metadata["classes"] == ["a", "b", "c", "d"] and metadata["task"] == "segment" and not again.training
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        out = model(x)
        assert torch.equal(out["out"], again(x)["out"])
    assert out["out"].shape == (1, 4, 64, 96) and set(out) == {"out"}


def test_every_parameter_learns():
    model = small("upernet").train()
    task = SegmentationModule(model)
    task.training_step((torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))), 0).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_backbone_weights_from_a_classifier(tmp_path):
    classifier = sgformer.create_model("sgformer_n", num_classes=7)
    sgformer.save_model(classifier, tmp_path / "c.safetensors", {"model": "sgformer_n", "task": "classify"})
    config = SegmentConfig(model="sgformer_n", head="semantic-fpn", weights=str(tmp_path / "c.safetensors")).resolved()
    model = started(config, 5)
    own = dict(classifier.named_parameters())
    for name, parameter in model.backbone.network.named_parameters():
        assert torch.equal(parameter, own[name])


def test_a_whole_segmenter_goes_on_with_other_classes(tmp_path):
    model = small("semantic-fpn", 3)
    model.save(tmp_path / "s.safetensors", {})
    config = SegmentConfig(model="sgformer_n", head="semantic-fpn", weights=str(tmp_path / "s.safetensors")).resolved()
    same, other = started(config, 3), started(config, 5)
    for new in (same, other):
        for name, tensor in model.state_dict().items():
            if new is same or not name.startswith("head.classifier"):
                assert torch.equal(new.state_dict()[name], tensor), name
    assert other.state_dict()["head.classifier.conv.weight"].shape[0] == 5
    with pytest.raises(
        UserError, match=r"holds sgformer_n with semantic-fpn of .*, not --model sgformer_n --head upernet"
    ):
        started(dataclasses.replace(config, head="upernet"), 3)


def test_with_a_frozen_backbone_the_head_learns():
    task = SegmentationModule(small("upernet"))
    task.freeze_backbone()
    task.train()
    learns = {name.split(".")[0] for name, p in task.model.named_parameters() if p.requires_grad}
    assert learns == {"head"} and all(p.requires_grad for p in task.model.head.parameters())
    assert task.model.head.training and not any(m.training for m in task.model.backbone.network.stages.modules())


def test_one_class_is_refused():
    with pytest.raises(UserError, match="two classes"):
        SegmentationModule(small(classes=1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "--steps"),
        ({"classes": 1}, "--classes"),
        ({"scale_max": 0.3}, "--scale-max"),
        ({"hflip": 2}, "--hflip"),
        ({"short_side": 8}, "--short-side"),
    ],
)
def test_settings_that_make_no_sense_are_named(options, says):
    with pytest.raises(UserError, match=says):
        SegmentConfig(**options)


# -- large photographs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [InferenceSettings(32), InferenceSettings(32, (32, 32)), InferenceSettings(32, flip=True)]
)
def test_parts_of_a_large_image_are_those_of_the_whole(how, monkeypatch):
    """At most `PART` bytes of probabilities exist at once, whatever the number of classes."""
    model, images = small(classes=5).eval(), torch.randn(2, 3, 75, 90)
    whole = class_probabilities(model, images, how)
    limit = 2 * 5 * 90 * 4 * 7
    monkeypatch.setattr(network, "PART", limit)
    parts = list(network.probabilities_by_rows(model, images, how))
    assert max(part.nbytes for _, part in parts) == limit and len(parts) == 11
    assert [rows.start for rows, _ in parts] == list(range(0, 75, 7)) and parts[-1][0].stop == 75
    torch.testing.assert_close(class_probabilities(model, images, how), whole, atol=1e-6, rtol=1e-5)
    assert torch.equal(network.predicted_labels(model, images, how), class_probabilities(model, images, how).argmax(1))


def test_nothing_of_a_part_stays_while_the_next_is_computed(monkeypatch):
    """Small tensors kept between the large ones of 500 parts cost 1.4 GiB of a process on a photograph of 12 MP."""
    kept, images = [], torch.randn(1, 3, 6, 4)

    class Part:
        def argmax(self, dim):
            labels = torch.zeros(1, 2, 4, dtype=torch.int64)
            kept.append(weakref.ref(labels))
            return labels

    def parts(*_):
        for top in (0, 2, 4):
            assert not any(labels() is not None for labels in kept)
            yield slice(top, top + 2), Part()

    monkeypatch.setattr(network, "probabilities_by_rows", parts)
    assert torch.equal(network.predicted_labels(None, images, None), torch.zeros(1, 6, 4))
    assert len(kept) == 3


def test_validation_in_parts_counts_every_pixel_once(monkeypatch):
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((40, 50), (40, 50), (64, 33))]
    labels = [torch.randint(0, 3, image.shape[1:], dtype=torch.uint8) for image in images]
    labels[0][:30] = 255
    batch = (images, labels, torch.arange(3), ())
    model = small().eval()
    task = SegmentationModule(model, SegmentConfig(image_size=32), inference=InferenceSettings(32))
    task.validation_step(batch, 0)
    counts, loss, by_image = task.confusion.compute(), task.val_loss.compute(), dict(task.by_image)
    assert counts.sum() == 2 * 40 * 50 + 64 * 33 - 30 * 50
    monkeypatch.setattr(network, "PART", 1)
    monkeypatch.setattr(module, "AT_ONCE", 1)
    again = SegmentationModule(model, SegmentConfig(image_size=32), inference=InferenceSettings(32))
    again.validation_step(batch, 0)
    assert torch.equal(again.confusion.compute(), counts) and again.by_image == by_image
    torch.testing.assert_close(again.val_loss.compute(), loss)
    assert module.groups_of_a_size(images) == [[0], [1], [2]]


def test_integers_are_normalised_as_floats_were():
    images = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)]
    labels, normalization = [torch.randint(0, 3, (40, 50))], Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model, losses = small().eval(), []
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalization)
    for one in (images, [(images[0].float() / 255 - mean) / std]):
        task = SegmentationModule(model, SegmentConfig(image_size=32), normalization=normalization)
        task.validation_step((one, labels, torch.arange(1), ()), 0)
        losses.append(task.val_loss.compute())
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)


def test_examples_of_large_photographs_are_drawn_small(tmp_path, monkeypatch):
    drawn = {}

    def keep(images, truths, predictions, names, out, captions):
        drawn.update(images=images, truths=truths, predictions=predictions, captions=captions)

    monkeypatch.setattr("sgformer.viz.segmentation.draw_comparison", keep)
    monkeypatch.setattr(predict, "SIDE", 50)
    pixels = torch.arange(64 * 100).reshape(64, 100) // 100
    image = (4 * pixels).clamp(max=255).to(torch.uint8).expand(3, -1, -1)
    samples = [(image, (pixels > 31).to(torch.uint8)), (None, None), (image[:, :20, :30], pixels[:20, :30])]
    by_image = {0: 0.25, 1: 0.5, 2: 0.75}
    listing = type("Listing", (), {"classes": ("a", "b", "c")})
    dataset = type("Data", (list,), {"listing": listing})(samples)
    predict.draw_examples(small().eval(), dataset, by_image, InferenceSettings(32), tmp_path / "e.png")
    assert [im.shape for im in drawn["images"]] == [(32, 50, 3), (20, 30, 3)]
    for kind in ("truths", "predictions"):
        assert [values.shape for values in drawn[kind]] == [(32, 50), (20, 30)]
    assert np.array_equal(drawn["truths"][0][:, 0], np.arange(32) > 15) and drawn["captions"][1] == "75 % right"
