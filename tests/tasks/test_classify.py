"""The classification task on its own, and in somebody else's trainer."""

import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import sgformer
from sgformer.core.errors import UserError
from sgformer.tasks.classify.config import ClassifyConfig

L = pytest.importorskip("lightning")
from sgformer.models.load import (  # noqa: E402
    build_model,
    build_network,
    read_weights,
    save_weights,
)
from sgformer.tasks.classify.data import read_listings  # noqa: E402
from sgformer.tasks.classify.metrics import Evaluation, report  # noqa: E402
from sgformer.tasks.classify.module import (  # noqa: E402
    ClassificationModule,
    balanced_weights,
    classifier_notes,
    classifier_rows,
    new_classifier,
)
from sgformer.tasks.classify.teacher import class_names  # noqa: E402


def stub(classes=7):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, classes))
    model.num_classes = classes
    return model


def batches(count, size, classes=7):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 4, 4, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


def test_metrics_equal_counting_by_hand(tmp_path):
    task, data = ClassificationModule(stub()), batches(3, 10)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    [values] = trainer.validate(task, torch.utils.data.DataLoader(data, batch_size=None), verbose=False)
    with torch.no_grad():
        logits = torch.cat([task.model(x) for x, _ in data]).numpy()
    truth = torch.cat([y for _, y in data]).numpy()
    rank = (-logits).argsort(1)
    assert values["top1"] == pytest.approx((rank[:, 0] == truth).mean())
    assert values["top5"] == pytest.approx((rank[:, :5] == truth[:, None]).any(1).mean())
    loss = -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(30), truth].mean()
    assert values["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert task.confusion.sum() == 30 and np.trace(task.confusion) == (rank[:, 0] == truth).sum()


def test_two_classes_have_a_top5(tmp_path):
    task = ClassificationModule(stub(2))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    [values] = trainer.validate(task, torch.utils.data.DataLoader(batches(1, 8, 2), batch_size=None), verbose=False)
    assert values["top5"] == 1


def test_learns_in_a_plain_trainer(tmp_path):
    config = ClassifyConfig(epochs=30, warmup_epochs=1, batch_size=16, lr=3.0, mixup=0, cutmix=0, smoothing=0)
    torch.manual_seed(0)
    task, data = ClassificationModule(stub(), config), batches(4, 16)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=30,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    before = trainer.validate(task, loader, verbose=False)[0]["top1"]
    trainer.fit(task, loader, loader)
    assert before < 0.4 < 0.8 < trainer.callback_metrics["top1"]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(config.scaled(task.config.min_lr), rel=0.05)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_mixed_targets_are_shares(size):
    task = ClassificationModule(stub(), ClassifyConfig(smoothing=0.1))
    images, labels = torch.rand(size, 3, 4, 4), torch.randint(7, (size,))
    before = images.clone()
    mixed, targets = task.mix(images, labels)
    assert mixed.shape == images.shape and targets.shape == (size, 7)
    assert torch.allclose(targets.sum(1), torch.ones(size)) and targets.min() >= 0.1 / 7 - 1e-6
    assert torch.equal(images, before)  # the batch itself is left alone
    if size % 2:  # the odd one out is not mixed
        assert torch.equal(mixed[-1], images[-1]) and targets[-1].argmax() == labels[-1]


def test_without_mixing_the_loss_is_smoothed_cross_entropy():
    task = ClassificationModule(stub(), ClassifyConfig(mixup=0, cutmix=0, smoothing=0.2))
    [(images, labels)] = batches(1, 9)
    expected = nn.functional.cross_entropy(task.model(images), labels, label_smoothing=0.2)
    assert task.training_step((images, labels), 0).item() == pytest.approx(expected.item(), rel=1e-6)


def optimizer_of(model, **options):
    task = ClassificationModule(model, ClassifyConfig(batch_size=256, **options), steps_per_epoch=10)
    return task.configure_optimizers()


def test_no_decay_on_norms_biases_and_the_position_table():
    model = build_model("sgformer_n", 10)
    optimizer = optimizer_of(model, weight_decay=0.05)["optimizer"]
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decayed) == len(list(model.parameters()))
    free = model.no_weight_decay()
    assert free
    for name, p in model.named_parameters():
        assert decayed[id(p)] == (0 if p.ndim <= 1 or name in free else 0.05), name


def test_layer_decay_lowers_the_rate_of_early_layers():
    model = build_model("sgformer_n", 10)
    optimizer = optimizer_of(model, layer_decay=0.5, lr=1.0, warmup_epochs=0)["optimizer"]
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    stem = next(p for name, p in names.items() if name.startswith("stem"))
    assert rate[id(names["head.fc.weight"])] == 0.25  # 1.0 x 256 / 1024
    assert rate[id(stem)] < 0.1 * 0.25


def test_schedule_warms_up_and_ends_low():
    made = optimizer_of(stub(), lr=4.0, warmup_lr=0.04, min_lr=0.4, epochs=4, warmup_epochs=1, cooldown_epochs=1)
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for step in range(50):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01) and rates[10] == max(rates) == 1.0  # no drop after the warm-up
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[25] == pytest.approx(0.55)  # half-way from 1 to .1, half-way from 10 to 40
    assert rates[40:] == [pytest.approx(0.1)] * 10


@pytest.mark.parametrize(("epochs", "given", "updates"), [(300, None, 50), (6, None, 30), (1, None, 5), (3, 0.25, 2)])
def test_the_warm_up_ends_before_the_run(epochs, given, updates):
    options = {} if given is None else {"warmup_epochs": given}
    assert ClassifyConfig(epochs=epochs, **options).resolved().warmup_updates(10) == updates


@pytest.mark.parametrize("name", ["sgformer_n", "test_efficientnet", "deit_tiny_distilled_patch16_224"])
def test_the_classifier_takes_the_rows_of_its_classes(tmp_path, name):
    path = tmp_path / "w.safetensors"
    size = {} if "deit" in name else {"image_size": 32}
    about = {"model": name, "classes": ["ant", "bee", "cat"], "wordnet": ["n01", "n02", "n03"], **size}
    torch.manual_seed(0)
    save_weights(build_model(name, 3), path, about)
    weights = read_weights(path)
    config = ClassifyConfig(model=name, **({} if size == {} else {"image_size": 32})).resolved()

    def start(*classes):
        rows = classifier_rows(weights, classes)
        model = new_classifier(config, len(classes), weights, rows)
        layers = model.get_classifier()
        return rows, (layers[0] if isinstance(layers, tuple) else layers), classifier_notes(weights, classes)

    _, same, notes = start("ant", "bee", "cat")
    assert notes == []
    rows, layer, notes = start("cat", "ant", "bee")
    assert rows == [2, 0, 1] and notes == [f"the classifier of {path} is kept, its classes matched by name"]
    assert torch.equal(layer.weight, same.weight[rows]) and torch.equal(layer.bias, same.bias[rows])
    rows, layer, _ = start("n03", "n01")
    assert rows == [2, 0] and torch.equal(layer.weight, same.weight[rows])
    rows, layer, notes = start("ant", "dog", "elk", "cat")
    assert notes == [f"of the classifier of {path}, 2 classes are kept; afresh: dog, elk"]
    assert torch.equal(layer.weight[[0, 3]], same.weight[[0, 2]])
    assert not any(torch.equal(layer.weight[1], row) for row in same.weight)
    rows, layer, notes = start("x", "y", "z")  # as many, but others
    assert rows == [None] * 3
    assert notes == [f"the classifier starts afresh: no class of the data is among those of {path}"]
    assert not any(torch.equal(a, b) for a in layer.weight for b in same.weight)


def test_a_classifier_of_nameless_classes_is_kept_if_their_number_fits(tmp_path):
    path = tmp_path / "w.safetensors"
    sgformer.save_model(sgformer.create_model("sgformer_n", num_classes=2), path)
    weights = read_weights(path)
    assert classifier_rows(weights, ["x", "y"]) is None and classifier_notes(weights, ["x", "y"]) == []
    assert classifier_notes(weights, ["a", "b", "c"]) == [
        f"the classifier starts afresh: {path} has 2 classes, the data 3"
    ]


def test_the_packages_classifier_knows_wordnet_ids():
    weights = read_weights("sgformer_n")
    ids, names = weights.metadata["wordnet"], weights.metadata["classes"]
    assert classifier_rows(weights, ids) is None and classifier_notes(weights, ids) == []
    assert classifier_rows(weights, [names[7], ids[3]]) == [7, 3]
    assert classifier_notes(weights, ["shirt", "hat"]) == []  # nobody expects its classes
    assert class_names(build_network(weights), weights.metadata)[0] == (names[0], ids[0])


def test_unknown_models_suggest_the_nearest():
    with pytest.raises(UserError, match="did you mean resnet50"):
        build_model("resnet5O", 10)
    with pytest.raises(UserError, match="sgformer_"):
        build_model("sgfromer_s", 10)


def test_drop_path_reaches_the_network():
    rates = [m.drop_prob for m in build_model("pvt_v2_b0", 10, drop_path_rate=0.3).modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)
    assert isinstance(build_model("resnet10t", 4), timm.models.ResNet)


# -- classes of unequal size ------------------------------------------------------------------------------------------


def test_balanced_weights_give_every_class_the_same_part_of_the_loss():
    counts = [90, 9, 1, 0]
    weights = balanced_weights(counts)
    assert (weights * torch.tensor(counts)).tolist() == pytest.approx([100 / 3] * 3 + [0], rel=1e-6)
    task = ClassificationModule(
        stub(4), ClassifyConfig(balance="weights", mixup=0, cutmix=0, smoothing=0), class_counts=counts
    )
    [(images, labels)] = batches(1, 9, 3)
    losses = nn.functional.cross_entropy(task.model(images), labels, reduction="none")
    expected = (losses * weights[labels]).mean()
    assert task.training_step((images, labels), 0).item() == pytest.approx(expected.item(), rel=1e-6)
    # The mean over a batch is that of its parts: processes and accumulation change nothing.
    parts = [task.training_step((images[i : i + 3], labels[i : i + 3]), 0).item() for i in (0, 3, 6)]
    assert np.mean(parts) == pytest.approx(expected.item(), rel=1e-6)
    assert not [name for name in task.state_dict() if "class_weights" in name]


def test_balanced_accuracy_is_the_mean_recall():
    confusion = np.array([[90, 10, 0], [5, 5, 0], [0, 0, 0]])  # of the last class there are no images
    result = Evaluation(95 / 110, 1.0, 0.5, confusion, ("a", "b", "c"))
    assert result.balanced_accuracy == pytest.approx((0.9 + 0.5) / 2)
    assert result.summary()["balanced_accuracy"] == result.balanced_accuracy
    assert "balanced accuracy 70.00 %" in result.table()
    assert "| Balanced accuracy (mean over classes) | 70.00 % |" in report("n", result, {}, [])


def test_balanced_training_keeps_the_weights_of_the_best_balanced_accuracy():
    assert ClassificationModule(stub()).monitor == "top1"
    for balance in ("weights", "sampling"):
        task = ClassificationModule(stub(), ClassifyConfig(balance=balance), class_counts=[1] * 7)
        assert task.monitor == "balanced_accuracy"


# -- a frozen backbone ------------------------------------------------------------------------------------------------


def test_a_frozen_backbone_keeps_weights_and_statistics():
    model = timm.create_model("resnet10t", num_classes=3, drop_path_rate=0.5)
    task = ClassificationModule(model.train(), ClassifyConfig(mixup=0, cutmix=0, lr=10.0), steps_per_epoch=4)
    task.freeze_backbone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = task.configure_optimizers()["optimizer"]
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(3, (4,))
    for mode in (False, True):  # as around a validation
        task.train(mode)
    task.training_step((images, labels), 0).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert task.training and model.training and model.fc.training and not model.layer1.training
    assert task.frozen_share().endswith("M parameters, all but those of fc")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_networks_of_one_size_are_built_for_the_image_size(name, tmp_path):
    """The weights come back at that size, and another one is refused in a line."""
    config = ClassifyConfig(model=name, image_size=64).resolved()
    model = new_classifier(config, 3)
    metadata = {"task": "classify", "model": name, "classes": ["a", "b", "c"], "image_size": 64, "crop_pct": 0.9}
    save_weights(model, tmp_path / "w.safetensors", metadata)
    image = Image.new("RGB", (80, 70))
    assert len(sgformer.predict(tmp_path / "w.safetensors", image)[0].labels) == 3
    with pytest.raises(UserError, match=rf"{name} takes 64 x 64 pixels only, without --image-size"):
        sgformer.predict(tmp_path / "w.safetensors", image, image_size=96)


def test_a_size_that_a_network_cannot_take_is_a_line():
    with pytest.raises(UserError, match=r"^maxvit_rmlp_pico_rw_256 does not take images of 72 x 72 pixels \(.*\)$"):
        new_classifier(ClassifyConfig(model="maxvit_rmlp_pico_rw_256", image_size=72).resolved(), 3)


@pytest.mark.parametrize("split", [False, True])
def test_one_class_is_refused_before_training(tmp_path, split):
    for i in range(4):
        path = tmp_path / ("train" if split or i % 2 else "val") / "ant" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    config = ClassifyConfig(data=str(tmp_path), val_split=0.5 if split else None)
    with pytest.raises(UserError, match=r"one class only, ant: a classifier tells two or more apart; add a folder"):
        read_listings(config, None)


def test_sigterm_ends_an_evaluation(tmp_path, monkeypatch):
    for name in ("ant", "bee"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "orange").save(tmp_path / "val" / name / "0.png")
    about = {"task": "classify", "classes": ["ant", "bee"], "image_size": 32}
    weights = sgformer.save_model(sgformer.create_model("sgformer_n", num_classes=2), tmp_path / "w.safetensors", about)
    step, seen, before = ClassificationModule.validation_step, [], signal.getsignal(signal.SIGTERM)

    def watched(*args):
        seen.append(signal.getsignal(signal.SIGTERM))
        return step(*args)

    monkeypatch.setattr(ClassificationModule, "validation_step", watched)
    sgformer.evaluate(weights, tmp_path, workers=0, device="cpu")
    assert seen == [signal.SIG_DFL] and signal.getsignal(signal.SIGTERM) == before
