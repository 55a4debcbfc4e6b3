"""Distillation: what the teacher sees, which of its classes count, the loss, and runs that end and resume with it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from photos import CLASSES, QUICK, make_photos
from safetensors.torch import save_file
from torch import nn

from sgformer.core.errors import UserError
from sgformer.data.preparing import IMAGENET, Normalization
from sgformer.models.checkpoint import read_safetensors
from sgformer.tasks.classify.config import ClassifyConfig

pytest.importorskip("lightning")
from sgformer.tasks.api import evaluate, train
from sgformer.tasks.classify.module import ClassificationModule
from sgformer.tasks.classify.teacher import StepShare, Teacher, class_names, find_indices, read_indices

NAME = "test_resnet"  # a tiny network of timm's with batch norm, at 160 pixels


class Says(nn.Module):
    """Gives the same logits for every image and keeps the images."""

    def __init__(self, *logits):
        super().__init__()
        self.num_classes, self.logits = len(logits), nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        self.seen = images
        return self.logits.expand(len(images), -1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The state dict of a network with ImageNet's classes, of which `cat` is none."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(timm.create_model(NAME).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def options(file):
    """Of a run with that teacher, everything random on."""
    table = file.with_name("classes.tsv")
    table.write_text("cat\t281,282\n")
    return {**QUICK, "teacher": f"{NAME}={file}", "teacher_classes": str(table)}


# -- what it sees and says --------------------------------------------------------------------------------------------


def test_the_teacher_sees_the_images_at_its_own_size_and_normalisation():
    network = Says(1.0, 2.0)
    own = {"image_size": [48, 64], "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    teacher = Teacher(network, own, [[0], [1]], IMAGENET)
    shade = torch.tensor([0.2, 0.6, 0.9]).view(1, 3, 1, 1)  # in 0..1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    teacher(((shade - mean) / std).expand(2, 3, 32, 32))
    assert network.seen.shape == (2, 3, 48, 64)
    expected = (shade - torch.tensor(own["mean"]).view(3, 1, 1)) / torch.tensor(own["std"]).view(3, 1, 1)
    assert torch.allclose(network.seen, expected.expand(2, 3, 48, 64), atol=1e-5)


def test_images_of_the_teachers_size_stay_as_they_are():
    network = Says(1.0, 2.0)
    own = Normalization((0.5,) * 3, (0.5,) * 3)
    images = torch.randn(2, 3, 32, 40)
    Teacher(network, {"image_size": [32, 40], **own.to_metadata()}, [[0], [1]], own)(images)
    assert torch.equal(network.seen, images)


def test_its_probabilities_are_those_of_the_data_alone():
    logits = torch.tensor([3.0, 1.0, 0.0, 2.0, 9.0])
    teacher = Teacher(Says(*logits.tolist()), {"image_size": 32}, [[3], [0, 2], [1]], IMAGENET)
    shares = teacher(torch.zeros(2, 3, 32, 32), temperature=2.0)
    e = (logits / 2).exp()
    expected = torch.stack([e[3], e[0] + e[2], e[1]]) / e[:4].sum()  # nothing is left for class 4
    assert torch.allclose(shares, expected.expand(2, 3)) and not shares.requires_grad


def module_of(teacher, **options):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    network.num_classes = 3
    config = ClassifyConfig(teacher="given", mixup=0, cutmix=0, smoothing=0, **options)
    return ClassificationModule(network, config, 1, CLASSES, teacher)


@pytest.fixture
def batch():
    return torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1])


def three():
    return Teacher(Says(0.5, -1.0, 2.0), {"image_size": 32}, [[0], [1], [2]], IMAGENET)


def test_soft_labels(batch):
    module = module_of(three(), teacher_weight=0.3, teacher_temperature=4.0)
    logits = module.model(batch[0])
    p = torch.tensor([0.5, -1.0, 2.0]).div(4).softmax(0)
    divergence = (p * (p.log() - (logits / 4).log_softmax(1))).sum(1).mean()
    out = module.training_step(batch, 0)
    assert out["loss"].item() == pytest.approx(
        (0.7 * F.cross_entropy(logits, batch[1]) + 0.3 * 16 * divergence).item(), rel=1e-5
    )
    assert out["parts"]["teacher_loss"].item() == pytest.approx(16 * divergence.item(), rel=1e-5)
    assert out["parts"]["teacher_top1"].item() == pytest.approx(0.2)  # it always says the third, one of five is


def test_hard_labels(batch):
    module = module_of(three(), teacher_weight=0.3, teacher_labels="hard")
    logits = module.model(batch[0])
    expected = 0.7 * F.cross_entropy(logits, batch[1]) + 0.3 * F.cross_entropy(logits, torch.full((5,), 2))
    assert module.training_step(batch, 0)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_of_the_teacher_alone_a_network_learns_what_the_teacher_says(batch):
    module = module_of(three(), teacher_weight=1.0, teacher_temperature=1.0)
    optimizer = torch.optim.Adam(module.model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    expected = torch.tensor([0.5, -1.0, 2.0]).softmax(0).expand(5, 3)
    assert torch.allclose(module.model(batch[0]).softmax(1), expected, atol=0.02)


def test_the_share_of_the_time(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("sgformer.tasks.classify.teacher.time.perf_counter", lambda: next(now))
    time, cpu = StepShare(), torch.device("cpu")
    for step in range(30):
        time.start(cpu)
        with time.part(cpu):
            pass
        time.stop(cpu)
        assert (time.share is None) == (step == 0)
    assert time.steps == 3 + 2 and time.share == pytest.approx(1 / 3)  # each measured step: start, part, part, stop


# -- classes ----------------------------------------------------------------------------------------------------------


def of_imagenet(classes, given=None):
    return find_indices(classes, class_names(timm.create_model(NAME), {}), given or {}, "T")


def test_classes_are_found_by_name():
    names = ["n01440764", "goldfish", "Golden_Retriever", "t-shirt", "tench, Tinca tinca"]
    assert of_imagenet(names[:4]) == [[0], [1], [207], [610]]
    assert of_imagenet(names[4:]) == [[0]]
    assert find_indices(["b", "a"], [("a",), ("b",), ("c",)], {}, "T") == [[1], [0]]
    assert find_indices(["Cat", "cat"], [("cat",), ("Cat",)], {}, "T") == [[1], [0]]  # as written comes first


def test_classes_that_a_file_gives_come_first():
    assert of_imagenet(["goldfish", "crane"], {"crane": [134, 517]}) == [[1], [134, 517]]
    assert find_indices(["x", "y"], None, {"x": [4], "y": [2]}, "T") == [[4], [2]]


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (["goldfish", "snark", "boojum"], "imagenet", r"no class for 'snark', 'boojum' \(2 of 3\): pass --teacher-cl"),
        (["goldfish", "crane"], "imagenet", r"several of its classes fit 'crane' \(134, 517\): pass --teacher-classes"),
        (["T shirt", "t-shirt"], "imagenet", r"is its class 610 \('T shirt' and 't-shirt'\)"),
        (["a", "b"], None, r"its classes have no names, so that 'a', 'b' cannot be found"),
    ],
)
def test_classes_that_cannot_be_found_are_named(classes, names, message):
    with pytest.raises(UserError, match=f"^--teacher T: .*{message}"):
        of_imagenet(classes) if names else find_indices(classes, None, {}, "T")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant 3", r"line 1: expected CLASS, a tab, INDEX"),
        ("ant\t3\n\nbee\t-1", r"line 3: expected CLASS, a tab, INDEX"),
        ("ant\t3\nwasp\t4", r"line 2: the data has no class 'wasp' \(classes: ant, bee, cat\)"),
        ("ant\t3\nant\t4", r"line 2: 'ant' or an index of it is listed twice"),
        ("ant\t3,3", r"listed twice"),
        ("ant\t10", r"the teacher has classes 0 to 9, got 10"),
        (b"\xff\xfe", r"cannot be read"),
    ],
)
def test_bad_files_of_classes(tmp_path, text, message):
    path = tmp_path / "c.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"c\.tsv: .*{message}"):
        read_indices(str(path), CLASSES, 10)


def test_a_good_file_of_classes(tmp_path):
    (tmp_path / "c.tsv").write_text("bee\t 7 , 3\n\nant\t0\n")
    assert read_indices(str(tmp_path / "c.tsv"), CLASSES, 10) == {"bee": [7, 3], "ant": [0]}
    with pytest.raises(UserError, match="no such file"):
        read_indices(str(tmp_path / "none.tsv"), CLASSES, 10)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_weight": 0.2}, "--teacher-weight is for runs with --teacher"),
        ({"teacher_classes": "x"}, "--teacher-classes is for runs with --teacher"),
        ({"teacher": "x", "teacher_weight": 0.0}, r"--teacher-weight must be above 0 and at most 1, got 0\.0"),
        ({"teacher": "x", "teacher_temperature": 0.0}, "--teacher-temperature must be above 0"),
        ({"teacher": "x", "teacher_labels": "hard", "teacher_temperature": 3.0}, "hard labels have none"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        ClassifyConfig(**options)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("test_resnett", "no such file, run or network of timm, did you mean test_resnet"),
        ("sgformer_t", "timm has no pretrained weights for it here"),
        ("{file}", r"not the network's name; for a plain state dict, --teacher NAME=FILE"),
        ("test_vit={file}", "do not fit the model"),
        (f"{NAME}={{file}}", r"no class for 'cat' \(1 of 3\)"),
        (f"{NAME}=none.pth", r"none\.pth: no such file"),
    ],
)
def test_teachers_that_cannot_teach(photos, file, tmp_path, teacher, message):
    with pytest.raises(UserError, match=f"^--teacher .*{message}") as raised:
        train("classify", data=str(photos), run=str(tmp_path / "r"), teacher=teacher.format(file=file), **QUICK)
    assert "\n" not in str(raised.value) and not (tmp_path / "r").exists()


def test_a_backbone_is_no_teacher(photos, tmp_path):
    save_file(timm.create_model(NAME, num_classes=0).state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="holds no classifier, only a backbone"):
        train("classify", data=str(photos), run="r", teacher=f"{NAME}={tmp_path / 'b.safetensors'}", **QUICK)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(photos, options, tmp_path_factory):
    """Six updates at once, an epoch and a half."""
    settings = {**options, "accumulate": 2}
    run = tmp_path_factory.mktemp("straight") / "run"
    return train("classify", data=str(photos), run=str(run), max_steps=6, **settings).path


def state(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_the_run_tells_of_its_teacher_and_keeps_nothing_of_it(run, photos, options):
    log = (run / "log.txt").read_text()
    assert "teacher test_resnet, 0.5 M parameters, at 160x160, 4 of its 1000 classes; 0.5 of the loss" in log
    assert "% of a training step" in log and "% of a training step" in (run / "report.md").read_text()
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "label_loss", "teacher_loss", "teacher_top1"} <= set(header)
    assert f"teacher: {options['teacher']}" in (run / "config.yaml").read_text()
    student = set(timm.create_model("sgformer_n", num_classes=3).state_dict())
    assert set(read_safetensors(run / "best.safetensors")[0]) == student
    saved = state(run)
    assert {name for name in saved["state_dict"] if name.startswith("model.")} == {f"model.{n}" for n in student}
    assert not [name for name in saved["state_dict"] if "teacher" in name]
    assert evaluate(run, photos, workers=0).images == 9  # without the teacher


def test_the_teacher_changes_the_run_and_is_not_changed_by_it(run, photos, options, file, tmp_path):
    before = file.read_bytes()
    settings = {k: v for k, v in options.items() if not k.startswith("teacher")}
    alone = train("classify", data=str(photos), run=str(tmp_path / "a"), max_steps=6, accumulate=2, **settings).path
    weights = [read_safetensors(folder / "last.safetensors")[0]["head.fc.weight"] for folder in (alone, run)]
    assert not torch.equal(*weights) and file.read_bytes() == before


def test_the_network_starts_as_it_does_without_a_teacher_and_the_teacher_stays_in_eval_mode(photos, options, tmp_path):
    from sgformer.tasks.registry import get_task

    task, built = get_task("classify"), []
    for changes in ({}, {"teacher": None, "teacher_classes": None}):
        config = ClassifyConfig(data=str(photos), **{**options, **changes}).resolved()
        splits = task.splits(config, None, 4, 0, 1)
        torch.manual_seed(0)
        built.append(task.module(config, splits, None))
    assert all(torch.equal(a, b) for a, b in zip(*(m.model.state_dict().values() for m in built), strict=True))
    module, teacher = built[0], built[0].frozen["teacher"]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    module.train()
    module.training_step((torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])), 0)["loss"].backward()
    assert not any(m.training for m in teacher.modules()) and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 5])
def test_resumed_equals_uninterrupted(run, photos, options, tmp_path, stop):
    train("classify", data=str(photos), run=str(tmp_path / "b"), max_steps=stop, **{**options, "accumulate": 2})
    train("classify", resume=tmp_path / "b", max_steps=6)
    one, two = state(run), state(tmp_path / "b")
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    averages = [s["callbacks"]["WeightAverage"]["model"] for s in (one, two)]
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


def test_another_teacher_under_the_same_name_is_noticed(photos, file, tmp_path):
    torch.manual_seed(1)
    path, table = tmp_path / "t.safetensors", tmp_path / "c.tsv"
    path.write_bytes(file.read_bytes())
    table.write_text("cat\t281\n")
    options = {**QUICK, "teacher": f"{NAME}={path}", "teacher_classes": str(table)}
    train("classify", data=str(photos), run=str(tmp_path / "r"), max_steps=1, **options)
    table.write_text("cat\t282\n")
    with pytest.raises(UserError, match="has changed since this run began"):
        train("classify", resume=tmp_path / "r", max_steps=2)
    table.write_text("cat\t281\n")
    save_file(timm.create_model(NAME).state_dict(), path)
    with pytest.raises(UserError, match="has changed since this run began"):
        train("classify", resume=tmp_path / "r", max_steps=2)


@pytest.mark.slow
def test_a_run_teaches_and_so_does_a_name(run, photos, file, tmp_path, monkeypatch):
    again = train("classify", data=str(photos), run=str(tmp_path / "a"), max_steps=1, teacher=str(run), **QUICK).path
    assert "teacher sgformer_n, 1.6 M parameters, at 32x32, all its 3 classes" in (again / "log.txt").read_text()
    from timm.models import _registry

    known = _registry._model_pretrained_cfgs[NAME]
    local = dataclasses.replace(known, hf_hub_id=None, source="", url="", file=str(file))
    monkeypatch.setitem(_registry._model_pretrained_cfgs, NAME, local)
    (tmp_path / "c.tsv").write_text("cat\t281,282\n")
    options = {**QUICK, "teacher": NAME, "teacher_classes": str(tmp_path / "c.tsv"), "teacher_labels": "hard"}
    named = train("classify", data=str(photos), run=str(tmp_path / "n"), max_steps=1, **options).path
    assert "at 160x160, 4 of its 1000 classes; 0.5 of the loss, hard labels" in (named / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_the_same(photos, options, tmp_path, strategy):
    plain = {**options, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "opt": "sgd", "lr": 10.0, "native": "off"}
    alone = train("classify", data=str(photos), run=str(tmp_path / "alone"), max_steps=2, **plain).path
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sgformer"]
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in plain.items()]
    command = [*launch, "--", "train", "classify", f"--data={photos}", f"--run={tmp_path / 'two'}", "--max-steps=2"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "OMP_NUM_THREADS": "1",
    }
    command += [*arguments, "--device=cpu", f"--strategy={strategy}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    weights = [read_safetensors(run / "last.safetensors")[0] for run in (alone, tmp_path / "two")]
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-5), name


def test_a_teacher_that_says_nan_is_named(photos, file, tmp_path):
    tensors = read_safetensors(file)[0]
    tensors["conv1.0.weight" if "conv1.0.weight" in tensors else "conv1.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "bad.safetensors")
    (tmp_path / "c.tsv").write_text("cat\t281\n")
    options = {"teacher": f"{NAME}={tmp_path / 'bad.safetensors'}", "teacher_classes": str(tmp_path / "c.tsv")}
    with pytest.raises(UserError, match=r"the loss is nan at step 1, first in teacher\.network\.conv1"):
        train("classify", data=str(photos), run=str(tmp_path / "r"), **QUICK, **options)
