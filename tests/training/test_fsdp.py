"""Weights shared out over two processes (FSDP2, gloo, CPU): the same numbers, states, files and errors as without."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from photos import make_photos, tensors

from sgformer.core.errors import UserError
from sgformer.models.checkpoint import read_safetensors
from sgformer.tasks.api import evaluate, train
from sgformer.tasks.classify.config import ClassifyConfig
from sgformer.training.config import ELEMENTWISE

pytest.importorskip("lightning")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))  # 18 images, and 9 to validate: 5 and 4


@pytest.fixture(scope="module")
def out(photos, tmp_path_factory):
    """The runs of `sharded_run.py`."""
    out = tmp_path_factory.mktemp("out")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"  # a process once ended in malloc: say where
    command = [*launch, str(HERE / "sharded_run.py"), str(photos), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return out


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    sys.path.insert(0, str(HERE))
    from sharded_run import PLAIN

    run = tmp_path_factory.mktemp("alone") / "run"
    return train("classify", data=str(photos), run=str(run), max_steps=2, **PLAIN).path


def weights(run, name="last.safetensors"):
    return read_safetensors(run / name)[0]


def losses(run):
    with (run / "metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


def state(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


# The sums of a gradient over four images are taken in another order: single precision's last bits.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "fsdp_accumulated"])
def test_two_processes_that_share_the_weights_give_those_of_one(alone, out, name):
    assert losses(out / name) == pytest.approx(losses(alone), rel=1e-4)
    one, two, start = weights(alone), weights(out / name), state(alone)["state_dict"]
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, **CLOSE)
    whole = state(out / name)["state_dict"]
    for key, value in start.items():  # the weights in training, beside their average
        torch.testing.assert_close(whole[key], value, **CLOSE)


@pytest.mark.slow
def test_it_is_what_ddp_computes_with_everything_random(out):
    assert losses(out / "fsdp_random") == pytest.approx(losses(out / "ddp_random"), rel=1e-4)
    for name in ("last.safetensors", "best.safetensors"):
        one, two = weights(out / "ddp_random", name), weights(out / "fsdp_random", name)
        for key, value in one.items():
            # AdamW divides by a gradient's size: where that is rounding alone, an update of the rate's size may differ.
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_stopped_and_resumed_is_the_straight_run_to_the_bit(out):
    one, two = state(out / "fsdp_random"), state(out / "fsdp_resumed")
    assert one["global_step"] == two["global_step"] == 6
    for part in ("state_dict", "optimizer_states", "callbacks"):
        a, b = tensors(one[part]), tensors(two[part])
        assert len(a) == len(b) > 100, part
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), part
    a, b = weights(out / "fsdp_random"), weights(out / "fsdp_resumed")
    assert all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.slow
def test_each_process_holds_half(out):
    facts = [json.loads((out / f"{rank}.json").read_text())["held"] for rank in (0, 1)]
    for what in ("model", "average", "moments"):
        parts, whole = [fact[what][0] for fact in facts], facts[0][what][1]
        assert sum(parts) == whole and max(parts) < 0.6 * whole, what


@pytest.mark.slow
def test_the_files_are_those_of_a_plain_network(out, photos):
    run, facts = out / "fsdp_random", json.loads((out / "0.json").read_text())
    result = evaluate(run, str(photos), workers=0, device="cpu")
    assert (result.images, facts["images"]) == (9, 9) and result.top1 == pytest.approx(facts["top1"])
    numbers = json.loads(next((run / "validation").glob("*.json")).read_text())
    assert result.confusion.sum() == 9 and result.top1 == pytest.approx(numbers["top1"])


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_stops_all(out):
    for rank in (0, 1):
        said = json.loads((out / f"{rank}.json").read_text())["said"]
        assert "at step 4" in said and "(step 3)" in said
    assert "the loss is nan" in said and "the loss function" in said  # said by the process that had it
    assert all(value.isfinite().all() for value in weights(out / "nan").values())


@pytest.mark.slow
def test_processes_that_see_different_states_do_not_start(out):
    for rank in (0, 1):
        seen = json.loads((out / f"{rank}.json").read_text())["seen"]
        assert "fsdp_resumed: processes find different checkpoints in it (steps 0 to 6)" in seen


@pytest.mark.slow
def test_optimisers_that_are_let_through_do_not_need_whole_tensors(out):
    found = json.loads((out / "0.json").read_text())["optimisers"]
    assert tuple(found) == ELEMENTWISE
    for name, (moved, apart) in found.items():
        assert moved > 1e-3 and apart < 1e-6, name


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"opt": "muon"}, "muon needs unsharded tensors"),
        ({"opt": "lamb"}, "lamb needs unsharded tensors"),
        ({"precision": "fp16"}, "not fp16"),
        ({"compile": True}, "does not support --compile"),
        ({"device": "mps"}, "not mps"),
    ],
)
def test_what_does_not_go_with_it_is_refused(option, match):
    with pytest.raises(UserError, match=match):
        ClassifyConfig(strategy="fsdp", **option)
