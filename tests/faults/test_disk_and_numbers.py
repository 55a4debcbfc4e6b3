"""Full and read-only disks, damaged files, losses that are no numbers, readers that die: a line that names it."""

import gzip
import os
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager

import pytest
import torch
from photos import QUICK, make_photos

import sgformer
from sgformer.cli import main
from sgformer.core.errors import StalledError, UserError
from sgformer.models.checkpoint import read_safetensors
from sgformer.models.load import read_metadata
from sgformer.tasks.api import train
from sgformer.tasks.classify.module import ClassificationModule

pytestmark = pytest.mark.slow  # whole runs, again and again

pytest.importorskip("lightning")
FOUR = {**QUICK, "max_steps": 4, "checkpoint_every": 1}
KEPT = ("last.ckpt", "previous.ckpt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))  # 18 images: 4 updates of 4 per epoch


@pytest.fixture(scope="module")
def half(photos, tmp_path_factory):
    """A run with three of its four updates done, and what the whole run ends with."""
    folder = tmp_path_factory.mktemp("half")
    whole = train("classify", data=str(photos), run=str(folder / "whole"), **FOUR).path
    run = train("classify", data=str(photos), run=str(folder / "run"), **{**FOUR, "max_steps": 3}).path
    return run, read_safetensors(whole / "last.safetensors")[0]


@pytest.fixture
def stopped(half, tmp_path):
    shutil.copytree(half[0], tmp_path / "run")
    return tmp_path / "run"


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resumed_is_whole(run, weights):
    train("classify", resume=run, max_steps=4)
    found = read_safetensors(run / "last.safetensors")[0]
    return all(torch.equal(value, found[name]) for name, value in weights.items())


# -- checkpoints ------------------------------------------------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda data: b"", lambda data: data + b"\0"], ids=["cut", "flip", "empty", "longer"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(half, stopped, caplog, damage):
    last = stopped / "checkpoints/last.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    assert resumed_is_whole(stopped, half[1])
    assert f"{last}: " in caplog.text and "resuming from previous.ckpt, step 2" in caplog.text


def test_without_the_last_one_the_one_before_goes_on(half, stopped):
    (stopped / "checkpoints/last.ckpt").unlink()  # killed between two renames
    assert resumed_is_whole(stopped, half[1])


def test_when_all_are_damaged_each_is_named(stopped):
    for name in KEPT:
        path = stopped / "checkpoints" / name
        path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(UserError, match=r"last\.ckpt: damaged.*previous\.ckpt: damaged.*remove") as caught:
        train("classify", resume=stopped, max_steps=4)
    one_line(caught)


def test_leftovers_and_half_a_row_do_no_harm(half, stopped):
    (stopped / "checkpoints/last.tmp").write_bytes(b"half")
    (stopped / ".best.safetensors.x.tmp").write_bytes(b"half")
    with (stopped / "metrics.csv").open("a") as table:
        table.write("1.25,1")  # of a row that would have said 12
    assert resumed_is_whole(stopped, half[1])
    assert not list(stopped.rglob("*.tmp"))
    assert [row.split(",")[1] for row in (stopped / "metrics.csv").read_text().splitlines()].count("1") == 1


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
NESTED = "[" * 2000 + "]" * 2000


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("config.yaml", BOMB.encode(), r"config\.yaml: not a YAML file \(line 2\): aliases"),
        ("config.yaml", f"image_size: '{NESTED}'".encode(), r"config\.yaml: image_size: neither aliases"),
        ("metrics.csv", b"epoch,step\n1,x\n2,3\n", r"metrics\.csv: damaged; remove it"),
        ("metrics.csv", b"epoch,step\n1,1,1\n\n", r"metrics\.csv: damaged; remove it"),
        ("metrics.csv", b"epoch,step,lr\n1,1,\xff\n\n", r"metrics\.csv: row 2 must hold numbers"),
        ("metrics.csv", b"a" * 200_000 + b"\n\n", r"metrics\.csv: damaged; remove it"),
        ("data.json.gz", gzip.compress(b"[" * 2**25), r"data\.json\.gz: damaged"),
        ("data.json.gz", gzip.compress(NESTED.encode()), r"data\.json\.gz: damaged"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(stopped, name, content, says):
    (stopped / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        train("classify", resume=stopped, max_steps=4)
    one_line(caught)


@pytest.mark.parametrize(
    "name, content",
    [
        ("metrics.json", b"[" * 2000),
        ("metrics.json", b"[]"),
        ("metrics.json", b'{"top1": "x"}'),
        ("confusion.csv", b"a,b\n1,x\n"),
        ("confusion.csv", b"a,b,c\n1,2\n1,2,3,4\n"),
        ("confusion.csv", b""),
    ],
)
def test_a_damaged_validation_is_named_by_a_run_with_nothing_left_to_do(half, tmp_path, name, content):
    shutil.copytree(half[0].parent / "whole", tmp_path / "run")
    (tmp_path / "run/validation" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"run/validation") as caught:
        train("classify", resume=tmp_path / "run", max_steps=4)
    one_line(caught)


def test_an_odd_environment_is_none(stopped):
    (stopped / "environment.json").write_text(NESTED)
    assert train("classify", resume=stopped, max_steps=4).environment()["sgformer"]


# -- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def files_no_longer_than(limit: int):
    """What a full disk does to large files, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(half, stopped, photos, caplog):
    before = {name: (stopped / "checkpoints" / name).read_bytes() for name in KEPT}
    with (
        files_no_longer_than(16 * 2**20),
        pytest.raises(UserError, match=r"last\.ckpt\.tmp: cannot be written \(File") as full,
    ):
        train("classify", resume=stopped, max_steps=4)
    one_line(full)
    assert {name: (stopped / "checkpoints" / name).read_bytes() for name in KEPT} == before
    assert f"step 3 is saved in {stopped}/checkpoints/last.ckpt; resume with: sgformer train" in caplog.text
    assert resumed_is_whole(stopped, half[1])


@contextmanager
def mounted(folder, options: str):
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    folder.mkdir()
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(photos, tmp_path, capsys, caplog):
    with mounted(tmp_path / "disk", "size=48m") as disk:  # room for one checkpoint of 26 MB, not for two
        command = ["train", "classify", "--data", str(photos), "--run", str(disk / "run")]
        options = {**FOUR, "checkpoint_every": 2}
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        assert main(command + words) == 2
        shown = capsys.readouterr()
        assert "No space left on device" in shown.err and shown.err.count("\n") == 1
        assert "step 2 is saved in" in caplog.text and "Traceback" not in shown.out + shown.err
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=128m", str(disk)], check=True)
        assert main(["train", "classify", "--resume", str(disk / "run")]) == 0


def test_a_read_only_disk(half, photos, tmp_path, capsys):
    with mounted(tmp_path / "disk", "size=256m") as disk:
        shutil.copytree(half[0], disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for command in (["--data", str(photos), "--run", str(disk / "new")], ["--resume", str(disk / "run")]):
            assert main(["train", "classify", "--max-steps", "4", *command]) == 2
            error = capsys.readouterr().err
            assert "Read-only file system" in error and str(disk) in error and error.count("\n") == 1


def test_a_file_where_the_folder_should_be(photos, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="run: not a folder"):
        train("classify", data=str(photos), run=str(tmp_path / "run"), **FOUR)
    with pytest.raises(UserError, match=r"inside: cannot be written \(.*\): name another folder with --run"):
        train("classify", data=str(photos), run=str(tmp_path / "run" / "inside"), **FOUR)


# -- losses -----------------------------------------------------------------------------------------------------------


def train_with(monkeypatch, photos, run, spoil, **options):
    """`spoil(task)` is called at the beginning of the third update."""
    step = ClassificationModule.training_step

    def third(task, batch, batch_idx):
        if task.global_step == 2:
            spoil(task)
        return step(task, batch, batch_idx)

    monkeypatch.setattr(ClassificationModule, "training_step", third)
    with pytest.raises(UserError) as stopped:
        train("classify", data=str(photos), run=str(run), **{**FOUR, **options})
    return one_line(stopped)


@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_nan_names_step_layer_and_images_and_keeps_the_weights_before(photos, tmp_path, monkeypatch, ema):
    def spoil(task):
        task.model.stages[1].blocks[0].mlp.fc1.register_forward_hook(lambda module, given, out: out * float("inf"))

    run = tmp_path / "run"
    said = train_with(monkeypatch, photos, run, spoil, ema=ema, checkpoint_every=100)
    assert said.startswith("the loss is nan at step 3, first in stages.1.blocks.0.mlp.fc1 (Linear), from the images ")
    assert f"{photos}/train/" in said and "lower --lr" in said and f"--weights {run}/last.safetensors (step 2)" in said
    assert read_metadata(run / "last.safetensors")["step"] == 2
    expected = train("classify", data=str(photos), run=str(tmp_path / "two"), **{**FOUR, "max_steps": 2, "ema": ema})
    kept, good = (sgformer.load_model(p / "last.safetensors").state_dict() for p in (run, expected.path))
    assert all(torch.equal(value, good[name]) for name, value in kept.items())


def test_a_gradient_that_is_no_number_stops_before_the_update(photos, tmp_path, monkeypatch):
    def spoil(task):
        task.model.stages[0].norm.weight.register_hook(lambda gradient: gradient * float("nan"))

    said = train_with(monkeypatch, photos, tmp_path / "run", spoil)
    assert said.startswith("a gradient is NaN or infinite at step 3, first in stages.0.norm.weight")
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 2 and all(value.isfinite().all() for value in state["state_dict"].values())


def test_spoilt_weights_are_named(photos, tmp_path, monkeypatch):
    def spoil(task):
        task.model.head.fc.bias.data[0] = float("inf")

    assert "first in the weights head.fc.bias" in train_with(monkeypatch, photos, tmp_path / "run", spoil)


# -- readers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_photos(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


def test_a_process_that_reads_images_and_dies(own_photos, tmp_path, monkeypatch):
    main_process = os.getpid()

    def die(*_):
        assert os.getpid() != main_process
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("sgformer.data.image._read", die)
    with pytest.raises(UserError, match=r"data worker [\d, ]+ (was killed|ended).*--workers") as died:
        train("classify", data=str(own_photos), run=str(tmp_path / "run"), **{**FOUR, "workers": 1})
    one_line(died)
    assert "data worker " in (tmp_path / "run/log.txt").read_text()


def test_a_file_that_vanishes(own_photos, tmp_path, monkeypatch):
    def spoil(task):
        for file in own_photos.glob("train/*/*"):
            file.unlink()

    said = train_with(monkeypatch, own_photos, tmp_path / "run", spoil)
    assert f"{own_photos}/train/" in said and "no such file" in said


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bad_images", ["stop", "skip"])
def test_a_mount_that_gives_no_answer(own_photos, tmp_path, monkeypatch, workers, bad_images):
    file = own_photos / "train/ant/2.png"
    file.unlink()
    os.mkfifo(file)  # opening it for reading waits for a writer that never comes
    monkeypatch.setenv("SGFORMER_READ_TIMEOUT", "0.3")
    with pytest.raises(StalledError, match=r"ant/2\.png: no answer for 0\.3 seconds: .* mount") as stalled:
        train(
            "classify",
            data=str(own_photos),
            run=str(tmp_path / "run"),
            **{**FOUR, "workers": workers, "bad_images": bad_images},
        )
    one_line(stalled)
