"""Run folders of others: nothing is written through their links, and their settings open no connection."""

import contextlib
import gzip
import json
import re
import shutil
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import hostile
import numpy as np
import pytest
import torch
import yaml

import sgformer
from sgformer.cli import main
from sgformer.core import files
from sgformer.core.errors import UserError
from sgformer.core.files import appending, distrust_links, make_folder, remove_folder, replacing, try_folder, write_text
from sgformer.data.sharding import make_shards
from sgformer.models.pretrained import pretrained_file
from sgformer.tasks.detect.metrics import NUMBERS
from sgformer.tasks.registry import get_task
from sgformer.tasks.sweep import read_ablation
from sgformer.training.config import to_yaml

pytest.importorskip("lightning")
from sgformer.training.recorder import finish, write_evolution


@pytest.fixture(autouse=True)
def _trusting(monkeypatch):
    monkeypatch.setattr(files, "_distrusted", set())


@pytest.fixture
def places(tmp_path):
    """A folder that is not trusted, reached through a link, and one outside."""
    (tmp_path / "real" / "own").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.txt").write_text("mine")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    distrust_links(tmp_path / "run")
    return tmp_path / "run", tmp_path / "outside"


def test_a_link_to_a_folder_is_not_followed(places):
    run, outside = places
    (run / "led").symlink_to(outside)
    (run / "own" / "led").symlink_to("../led")
    for folder in (run / "led", run / "own" / "led", run / "led" / "new"):
        for write in (
            lambda folder=folder: write_text(folder / "a.txt", "theirs"),
            lambda folder=folder: make_folder(folder),
            lambda folder=folder: remove_folder(folder),
            lambda folder=folder: try_folder(folder),
            lambda folder=folder: appending(folder / "a.txt").__enter__(),
        ):
            with pytest.raises(UserError, match=r"led: a link in .*, through which nothing is written"):
                write()
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]
    write_text(run / "own" / "b.txt", "fine")  # the link on the way to the run is its user's
    assert (run / "own" / "b.txt").read_text() == "fine"


def test_a_link_to_a_file_is_replaced_or_refused(places):
    run, outside = places
    for name in ("b.txt", "b.txt.tmp"):
        (run / name).symlink_to(outside / "a.txt")
    with replacing(run / "b.txt") as unfinished:
        unfinished.write_text("theirs")
    assert (run / "b.txt").read_text() == "theirs" and not (run / "b.txt").is_symlink()
    (run / "c.txt").symlink_to(outside / "a.txt")
    (run / "d.txt").symlink_to("/dev/full")
    (run / "e.txt").mkdir()
    for name in ("c.txt", "d.txt", "e.txt"):
        with pytest.raises(UserError, match=name), appending(run / name):
            pass
    assert (outside / "a.txt").read_text() == "mine"


def test_links_elsewhere_are_the_users(places, tmp_path):
    outside = places[1]
    (tmp_path / "led").symlink_to(outside)
    write_text(tmp_path / "led" / "a.txt", "new")
    assert (outside / "a.txt").read_text() == "new"


def plan(command, links=(), settings=()):
    whole = {"links": dict(links), "settings": dict(settings), "damaged": [], "seed": 0, "command": command}
    return json.dumps(whole).encode()


@pytest.mark.slow
def test_run_folders(tmp_path):
    outcomes = {hostile.try_run(*one, tmp_path) for one in islice(hostile.mutated_runs(1), 30)}
    assert outcomes == {"accepted", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "nothing"])
def test_all_files_are_links_and_a_run_resumes(kind, tmp_path):
    """Each is replaced by a file; only what is read and what is appended to must be its own."""
    own = ("config.yaml", "checkpoints/last.ckpt", "metrics.csv", "log.txt", "data.json.gz")
    run = hostile.a_run()[0]
    links = {name: kind for name in hostile.run_places() if (run / name.removesuffix(".tmp")).is_file()}
    links = {name: kind for name in links if name not in own and not name.startswith("best")}
    read = (".npz", ".safetensors") if kind == "file" else (".npz",)
    links = {name: kind for name in links if not name.endswith(read) and not name.startswith("validation/")}
    assert len(links) > 30
    assert hostile.try_run("", plan("resume", links), tmp_path) == "accepted"


@pytest.mark.parametrize("place", ["checkpoints", "validation", "significance", "log.txt", "metrics.csv"])
def test_what_leads_out_of_a_run_is_named_before_it_resumes(place, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml({"data": "photos"}))
    (run / place).symlink_to(tmp_path)
    assert main(["train", "classify", "--resume", str(run)]) == 2
    assert capsys.readouterr().err.startswith(f"sgformer: error: {run / place}: a link in {run}, ")


def test_the_default_folder_of_eval_is_no_link(tmp_path, capsys):
    (tmp_path / "outside").mkdir()
    shutil.copy(pretrained_file("sgformer_n"), tmp_path / "w.safetensors")
    (tmp_path / "w-eval").symlink_to(tmp_path / "outside")
    assert main(["eval", str(tmp_path / "w.safetensors"), "--data", str(tmp_path)]) == 2
    assert "w-eval: a link; remove it, or name a folder with --out" in capsys.readouterr().err


def test_commands_try_no_place_through_a_link_of_a_run(tmp_path, capsys):
    """Before they know anything else of it."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    for name, content in (("config.yaml", b"data: x\n"), ("best.safetensors", b"x"), ("m.onnx", b"x")):
        (run / name).write_bytes(content)
    (run / "out").symlink_to(outside)
    made = []
    touch, mkdir = Path.touch, Path.mkdir
    with (
        mock.patch.object(Path, "touch", lambda path, *rest, **more: (made.append(path), touch(path, *rest, **more))),
        mock.patch.object(Path, "mkdir", lambda path, *rest, **more: (made.append(path), mkdir(path, *rest, **more))),
    ):
        for command in (
            ["localization", str(run), "--data", "x", "--out", str(run / "out/new")],
            ["predict", str(run), "x.png", "--features", str(run / "out/new/f.npz")],
            ["predict", str(run / "m.onnx"), str(tmp_path), "--out", str(run / "out/new")],
            ["export", str(run), "--out", str(run / "out/new/m.onnx")],
            ["eval", str(run), "--data", "x", "--out", str(run / "out/new")],
        ):
            assert main(command) == 2, command
    assert made == [] and list(outside.iterdir()) == []


def test_what_weights_say_opens_no_connection(tmp_path, capsys):
    """Whatever else their metadata name."""
    photo = str(next((hostile.a_run()[1] / "val").rglob("*.png")))
    keys = ("data", "val_data", "weights", "teacher", "images", "path", "url", "pretrained", "label_names")
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=3, img_size=32)
    for address in hostile.ELSEWHERE:
        about = {
            **dict.fromkeys(keys, address),
            "model": address,
            "classes": [address, "b", "c"],
            "image_size": [32, 32],
        }
        sgformer.save_model(model, tmp_path / "w.safetensors", about)
        with hostile.offline() as asked:
            assert main(["predict", str(tmp_path / "w.safetensors"), photo, "--device", "cpu"]) in (0, 2)
        assert not asked
    assert "secret" not in "".join(capsys.readouterr())


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", hostile.ELSEWHERE)
@pytest.mark.parametrize("field", ["data", "val_data", "weights", "teacher", "images"])
def test_settings_in_files_open_no_connection(field, address, tmp_path, capsys):
    """Neither those of a run nor those of a recipe; a published network's name is allowed in a recipe."""
    run = tmp_path / "run"
    run.mkdir()
    task = "detect" if field in ("images", "val_data") else "classify"
    values = {"data": str(tmp_path / "nowhere"), field: address}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    recipe = ["train", task, "--config", str(run / "config.yaml")]
    for command in (["train", task, "--resume", str(run)], recipe):
        with hostile.offline() as asked:
            assert main(command) == 2
        said = capsys.readouterr().err
        assert not asked and said.count("\n") == 1 and "secret" not in said
        if "hf" not in address:
            assert f"config.yaml: {field.replace('_', '-')} is elsewhere, " in said


def test_a_resumed_run_names_its_teacher_again(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        yaml.safe_dump({"data": str(tmp_path / "nowhere"), "weights": None, "teacher": "resnet50"})
    )
    with hostile.offline() as asked:
        assert main(["train", "classify", "--resume", str(run)]) == 2
        assert "teacher is elsewhere, resnet50: " in capsys.readouterr().err
        with pytest.raises(UserError, match="teacher is elsewhere"):
            sgformer.train("classify", resume=run)
        assert main(["train", "classify", "--resume", str(run), "--teacher", "resnet50"]) == 2
        assert "nowhere" in capsys.readouterr().err  # as far as the data
    assert not asked


def test_an_ablation_opens_no_connection(tmp_path):
    file = tmp_path / "a.yaml"
    (tmp_path / "r.yaml").write_text("weights: s3://b/x\n")
    option = {"data": "x", "options": {"teacher": "s3://b/x"}}
    for spec in ({"data": "s3://b/x"}, option, {"config": "r.yaml", "data": "x"}):
        file.write_text(yaml.safe_dump({**spec, "variants": {"one": {}, "two": {"lr": 0.1}}}))
        with pytest.raises(UserError, match="is elsewhere, s3://b/x"):
            read_ablation(file)
    file.write_text(yaml.safe_dump({"data": "s3://b/x", "variants": {"one": {}}}))
    assert read_ablation(file, "memory://x").common["data"] == "memory://x"


@pytest.mark.slow
def test_passwords_are_kept_nowhere(tmp_path, monkeypatch, capsys, caplog):
    """A run on an address with a login: in none of its files, and in nothing that is said."""
    fsspec = pytest.importorskip("fsspec")
    address = "memory://user:secret@host/photos"
    shards = make_shards(hostile.a_run()[1], tmp_path / "shards")
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), memory._strip_protocol(address), recursive=True)
    run = tmp_path / "run"
    begin = ["train", "classify", "--data", address, "--run", str(run)]
    begin += [word for name, value in hostile.RUN.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["sgformer", *begin])
    assert main(begin) == 0
    assert main(["eval", str(run), "--data", address, "--workers", "0", "--device", "cpu"]) == 0
    assert main(["train", "classify", "--resume", str(run), "--epochs", "2", "--max-steps", "2"]) == 2
    assert "add --data memory://host/photos" in capsys.readouterr().err
    again = ["--resume", str(run), "--epochs", "2", "--max-steps", "2", "--data", address]
    assert main(["train", "classify", *again]) == 0
    memory.rm(f"{memory._strip_protocol(address)}/val/000000.tar")
    assert main(["train", "classify", *again[:-4], "--max-steps", "3", "--data", address]) == 2
    assert main(["data", "check", address]) in (1, 2)
    said = "".join(capsys.readouterr()) + caplog.text
    assert "memory://host/photos" in said and "secret" not in said
    for path in run.rglob("*"):
        if path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            assert b"secret" not in data, path


@pytest.mark.parametrize(
    "address", ["ftp://user:secret@127.0.0.1:1/x", "http://user:secret@127.0.0.1:1/x", "nosuch://user:secret@host/x"]
)
def test_an_address_that_does_not_answer_is_named_without_its_password(address, tmp_path, capsys):
    pytest.importorskip("fsspec")
    assert main(["train", "classify", "--data", address]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "secret" not in said and address.replace("user:secret@", "") in said


@pytest.mark.parametrize("key", ["plugin", "plugins", "sgformer_plugins", "SGFORMER_PLUGINS"])
def test_no_file_names_a_plugin(key, tmp_path, capsys):
    run, plugin = tmp_path / "run", tmp_path / "run" / "mine.py"
    run.mkdir()
    plugin.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (run / "config.yaml").write_text(yaml.safe_dump({"data": str(tmp_path), key: str(plugin)}))
    (run / "a.yaml").write_text(yaml.safe_dump({"data": str(tmp_path), key: str(plugin), "variants": {"one": {}}}))
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=0, img_size=32)
    sgformer.save_model(model, run / "best.safetensors", {key: str(plugin), "classes": ["a"], "image_size": 32})
    for command in (
        ["train", "classify", "--resume", str(run)],
        ["train", "classify", "--config", str(run / "config.yaml")],
        ["ablate", "--config", str(run / "a.yaml")],
        ["predict", str(run), str(next((hostile.a_run()[1] / "val").rglob("*.png")))],
    ):
        assert main(command) == 2
        assert (
            key.lower().replace("_", "-") in capsys.readouterr().err.lower().replace("_", "-") or "predict" in command
        )
    assert not (tmp_path / "ran").exists()


# -- tables -----------------------------------------------------------------------------------------------------------

COUNTS = "true \\ predicted,a,b\na,3,1\nb,0,2\n"
CLASSIFIED = {"top1": 0.8, "top5": 1.0, "balanced_accuracy": 0.8, "loss": 0.5, "images": 6, "skipped": []}
SEGMENTED = {"miou": 0.8, "macc": 0.8, "accuracy": 0.8, "loss": 0.5, "images": 6, "skipped": ["x.png: damaged"]}
MEASURED = dict.fromkeys(NUMBERS, 0.5)
DETECTED = {"box": MEASURED, "images": 6, "objects": 9, "skipped": []}
OBJECTS = "class,objects,box_AP,box_AP50\na,4,0.5,0.5\nb,5,,\n"
PRECISION = "class \\ recall" + ",0.5" * 101 + "\na" + ",1" * 101 + "\nb" + "," * 101 + "\n"
EVALUATIONS = {
    "classify": {"metrics.json": json.dumps(CLASSIFIED), "confusion.csv": COUNTS},
    "segment": {"metrics.json": json.dumps(SEGMENTED), "confusion.csv": COUNTS},
    "detect": {"metrics.json": json.dumps(DETECTED), "classes.csv": OBJECTS, "precision_box.csv": PRECISION},
}
ODD = (
    *(
        "",
        "[]",
        "{}",
        "null",
        "true",
        '{"top1": "x"}',
        "a",
        "a,b\n",
        "\n",
        "a,b,c\na,1\n",
        "a,b\n1,2,3\n",
        "a,b\n1,x\n",
    ),
    *("true,a,b\na,-3,1\nb,0,2\n", "true,a,b\na,3,1\n", json.dumps(CLASSIFIED | {"top1": "0.5"})),
    *(json.dumps(CLASSIFIED | {"top1": [1]}), json.dumps(CLASSIFIED | {"skipped": None})),
    *(json.dumps(DETECTED | {"box": {"AP": 1}}), json.dumps(DETECTED | {"box": dict.fromkeys(NUMBERS, "x")})),
    *(OBJECTS.replace("box_AP", "AP"), OBJECTS.replace("class", "x"), PRECISION + PRECISION, OBJECTS + "c,1,,\n"),
)


@pytest.mark.parametrize("task", EVALUATIONS)
def test_tables_of_an_evaluation_that_mean_nothing_are_named(task, tmp_path):
    """All that a resumed run reads of them, before it says anything."""
    read = get_task(task).read_evaluation
    for name, content in EVALUATIONS[task].items():
        (tmp_path / name).write_text(content)
    read(tmp_path).write(tmp_path / "again", picture=False)
    for name, content in EVALUATIONS[task].items():
        for odd in ODD:
            (tmp_path / name).write_text(odd)
            if odd in content:
                continue
            with contextlib.suppress(UserError):  # which names it
                read(tmp_path).write(tmp_path / "again", picture=False)
        for odd in ODD[:4]:
            (tmp_path / name).write_text(odd)
            with pytest.raises(UserError, match=re.escape(str(tmp_path))):
                read(tmp_path)
        (tmp_path / name).write_text(content)


def test_records_of_others_are_read_within_bounds(tmp_path):
    """Of `--record-significance`: arrays that are too large, of other kinds, or of other sizes than those before."""
    map_ = np.random.default_rng(0).random((4, 4), dtype=np.float32)
    whole = {"epoch": 1, "step": 5, "image": np.zeros((16, 16, 3), np.uint8)}
    whole |= {"significance/1.1": map_, "salient/1.1": map_ > 0.5}

    def record(number, **changes):
        arrays = {name: value for name, value in {**whole, "epoch": number, **changes}.items() if value is not None}
        (tmp_path / f"{number:04d}").mkdir(exist_ok=True)
        np.savez_compressed(tmp_path / f"{number:04d}" / "00.npz", **arrays)

    record(1)
    record(2)
    assert [row["epoch"] for row in write_evolution(tmp_path)] == [1, 2]
    bomb = np.broadcast_to(np.uint8(0), (8192, 8192, 3))
    for changes, says in (
        ({"image": bomb}, "too large"),
        *(({name: None}, "other kinds") for name in ("epoch", "step", "image", "significance/1.1", "salient/1.1")),
        *(({name: np.zeros(())}, "other kinds") for name in whole),
        ({"salient/1.1": np.zeros((4, 5), bool)}, "other kinds"),
        ({"significance/../x": map_, "salient/../x": map_ > 0.5}, "other kinds"),
        ({"objects": np.zeros(3)}, "other kinds"),
        ({"significance/1.1": np.ones((5, 5)), "salient/1.1": np.ones((5, 5), bool)}, "other maps"),
    ):
        record(2, **changes)
        for read in (write_evolution, partial(finish, unit="epoch")):
            with pytest.raises(UserError, match=rf"0002.*{says}"):
                read(tmp_path)
    (tmp_path / "0002/00.npz").unlink()
    with pytest.raises(UserError, match=r"0002: holds no record"):
        write_evolution(tmp_path)
