"""Hostile input is refused in one line, or accepted and right; `make torture` tries more of it."""

import builtins
import os
import pickle
import tracemalloc
from itertools import islice

import hostile
import numpy as np
import pytest
import torch

from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.data.image import read_image
from sgformer.models.released import load_released
from sgformer.training.state_file import StateIO, read_step

pytest.importorskip("pycocotools")


@pytest.mark.filterwarnings("ignore")
def test_images():
    outcomes = {hostile.try_image(*image) for image in islice(hostile.mutated_images(1), 1200)}
    assert outcomes == {"accepted", "refused"}


def test_every_seed_is_read_whole():
    assert all(hostile.try_image(*seed) == "accepted" for seed in hostile.seeds().items())


def test_weights(tmp_path):
    for name, data in islice(hostile.mutated_weights(1), 60):
        hostile.try_weights(name, data, tmp_path)
    for ending, data in zip((".safetensors", ".pth"), hostile.weights()[:2], strict=True):
        assert hostile.try_weights(f"whole{ending}", data, tmp_path) == "accepted"


def test_a_tensor_that_is_marked_as_a_folder_is_not_left_to_chance(tmp_path):
    """torch's reader skips it and returns uninitialised memory."""
    data = bytearray(hostile.weights()[1])
    entry = data.rfind(b"PK\1\2", 0, data.rfind(b"archive/data/2"))
    data[entry + 38] |= 16  # the directory bit of DOS
    assert hostile.try_weights("folder.pth", bytes(data), tmp_path) == "refused"


def test_annotations(tmp_path):
    outcomes = [hostile.try_annotations(*one, tmp_path) for one in islice(hostile.mutated_annotations(1), 400)]
    assert set(outcomes) == {"accepted", "refused"}


def test_files_of_other_tools(tmp_path):
    for name, (_, file, whole) in hostile.tool_files().items():
        assert hostile.try_tool_file(name, whole[file], tmp_path) == "accepted", name
    outcomes = {}
    for name, data in islice(hostile.mutated_tool_files(1), 480):
        outcomes.setdefault(name, set()).add(hostile.try_tool_file(name, data, tmp_path))
    assert outcomes == {name: {"accepted", "refused"} for name in hostile.tool_files()}


def test_label_maps(tmp_path):
    outcomes = {hostile.try_label_map(*one, tmp_path) for one in islice(hostile.mutated_label_maps(1), 400)}
    assert outcomes == {"accepted", "refused"}


def test_shards(tmp_path):
    outcomes = {}
    for name, data in islice(hostile.mutated_shards(1), 300):
        outcomes.setdefault(name.rpartition(".")[2], set()).add(hostile.try_shards(name, data, tmp_path))
    assert outcomes == {"json": {"accepted", "refused"}, "tar": {"accepted", "refused"}}


@pytest.mark.slow
def test_commands_and_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in islice(hostile.mutated_commands(1), 150):
        hostile.try_command(arguments)
    for name, data in islice(hostile.mutated_recipes(1), 100):
        hostile.try_recipe(name, data, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_bomb_in_a_comment_stays_packed():
    bomb = hostile.png_text_bomb()
    tracemalloc.start()
    image = read_image(bomb, "bomb.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(image, read_image(hostile.seeds()["RGB.png"], "plain.png"))
    assert peak < 2**24  # the comment has 64 MB


# -- pickles ----------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


PAYLOADS = {
    "os.system": Call(os.system, "touch pwned"),
    "exec": Call(builtins.exec, "open('pwned', 'w')"),
    "open": Call(builtins.open, "pwned", "w"),
    "getattr": Call(builtins.getattr, Call(builtins.__import__, "os"), "system"),
    "torch.load": Call(torch.load, "x"),
    "inside a tensor": {"a": torch.zeros(1), "b": [Call(os.mkdir, "pwned")]},
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.filterwarnings("ignore")
def test_no_pickle_is_run_wherever_it_is_given(tmp_path, monkeypatch, capsys, payload):
    monkeypatch.chdir(tmp_path)
    evil = {"state_dict": {"head.weight": PAYLOADS[payload]}, "global_step": PAYLOADS[payload]}
    torch.save(evil, "zip.pth")
    torch.save(evil, "old.pth", _use_new_zipfile_serialization=False)
    with open("bare.pth", "wb") as file:
        pickle.dump(evil, file)
    for name in ("zip.pth", "old.pth", "bare.pth"):
        assert hostile.refused(name, lambda name=name: load_released(name)) == "refused"
        for command in (
            ["eval", name, "--data", "."],
            ["convert", name, "out.safetensors"],
            ["predict", name, "x.png"],
        ):
            assert main(command) == 2
            assert capsys.readouterr().err.count("\n") == 1
    StateIO().save_checkpoint(evil, tmp_path / "last.ckpt")  # with a right checksum
    with pytest.raises(UserError, match=r"last\.ckpt: not a readable checkpoint"):
        read_step(tmp_path / "last.ckpt")
    assert {file.name for file in tmp_path.iterdir()} == {"zip.pth", "old.pth", "bare.pth", "last.ckpt"}
