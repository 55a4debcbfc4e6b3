"""Several processes: the same numbers as one, and a clear end when one of them dies. gloo, on the CPU."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from photos import QUICK, make_photos

from sgformer.models.checkpoint import read_safetensors
from sgformer.tasks.api import train
from sgformer.tasks.classify.metrics import Evaluation
from sgformer.training.run_folder import RunFolder

pytest.importorskip("lightning")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def torchrun(launch, options, out, run, *begin):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "sgformer", "--", "train", "classify"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/distributed.md
    return subprocess.Popen(
        [*command, *map(str, begin), *words], env=environment, stdout=out.open("a"), stderr=subprocess.STDOUT
    )


def free_port() -> int:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return port.getsockname()[1]


def test_two_nodes_give_the_weights_of_one_process(photos, tmp_path):
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "opt": "sgd", "max_steps": 2, "lr": 10.0, "device": "cpu"}
    options = {**QUICK, **plain}
    alone = train("classify", data=str(photos), run=str(tmp_path / "alone"), **options).path
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    begin = ("--data", photos, "--run", tmp_path / "both")
    nodes = [
        torchrun(list(map(str, [*meeting, "--node-rank", i])), options, tmp_path / f"{i}.txt", tmp_path, *begin)
        for i in range(2)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0], (tmp_path / "0.txt").read_text()
    one, two = (read_safetensors(run / "last.safetensors")[0] for run in (alone, tmp_path / "both"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    rows = [(run / "metrics.csv").read_text().splitlines()[1].split(",") for run in (alone, tmp_path / "both")]
    assert float(rows[0][3]) == pytest.approx(float(rows[1][3]), rel=1e-4)
    # Nine images to validate, five on one node and four on the other: each counts once.
    results = [Evaluation.read(run / "validation") for run in (alone, tmp_path / "both")]
    assert [result.images for result in results] == [9, 9]
    assert (results[0].confusion.sum(axis=1) == results[1].confusion.sum(axis=1)).all()
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-3)


def kill_a_rank(launcher) -> None:
    """The youngest child of torchrun."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


def wait_for_step(run, step, launcher):
    deadline = time.monotonic() + 240
    while RunFolder(run).usable_checkpoint()[1] < step:
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.2)


def test_a_rank_that_dies_ends_the_job_and_a_restart_goes_on(photos, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out.txt"
    options = {**QUICK, "epochs": 400, "device": "cpu", "checkpoint_every": 2}
    local = ["--standalone", "--nproc-per-node", "2"]
    launcher = torchrun(local, options, out, run, "--data", photos, "--run", run)
    wait_for_step(run, 4, launcher)
    kill_a_rank(launcher)
    assert launcher.wait(timeout=240) != 0
    assert "SIGKILL" in out.read_text() and RunFolder(run).usable_checkpoint()[1] >= 4
    # Started with --resume, torchrun's own restart is enough.
    step = RunFolder(run).usable_checkpoint()[1]
    launcher = torchrun([*local, "--max-restarts", "1"], {"max_steps": step + 40}, out, run, "--resume", run)
    wait_for_step(run, step + 2, launcher)
    kill_a_rank(launcher)
    assert launcher.wait(timeout=240) == 0, out.read_text()[-3000:]
    assert RunFolder(run).usable_checkpoint()[1] == step + 40
