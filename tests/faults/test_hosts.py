"""Two hosts: network namespaces of their own with a cable between them, and nothing else to talk over.

Needs Linux, root and `ip` (Debian's iproute2); skips itself where namespaces are not permitted.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from photos import QUICK, make_photos

from sgformer.models.checkpoint import read_safetensors
from sgformer.tasks.api import train
from sgformer.training.run_folder import RunFolder

pytest.importorskip("lightning")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ADDRESS = ("10.77.0.1", "10.77.0.2")
counter = itertools.count()


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two namespaces; the cable's end is `cable` in both."""
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    names = [f"sg{os.getpid()}-{next(counter)}-{side}" for side in "ab"]
    ends = [f"sg{os.getpid()}{side}" for side in "ab"]  # 15 characters at most
    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
            made.append(name)
        try:
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"veth is not permitted here: {error.stderr.strip()}")
        for name, end, address in zip(names, ends, ADDRESS, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "cable")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def start(hosts, launch, words, out):
    """Start `sgformer WORDS` as one job on both hosts; `launch` has torchrun's words for each host."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/distributed.md
    agents = []
    for name, own in zip(hosts, launch, strict=True):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command = [*command, "--nproc-per-node", "1", *own, "-m", "sgformer", "--", *words]
        with (out / f"{name}.txt").open("w") as text:
            agents.append(
                subprocess.Popen(list(map(str, command)), env=environment, stdout=text, stderr=subprocess.STDOUT)
            )
    return agents


def wait(agents, hosts, out):
    """Wait for a job's good end; returns what the first host said."""
    try:
        statuses = [agent.wait(timeout=400) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    said = [(out / f"{name}.txt").read_text() for name in hosts]
    assert statuses == [0, 0], "\n".join(text[-3000:] for text in said)
    return said[0]


def on_both(hosts, words, out):
    launch = [["--master-addr", ADDRESS[0], "--master-port", 29400, "--node-rank", rank] for rank in (0, 1)]
    return wait(start(hosts, launch, words, out), hosts, out)


def came_over_the_cable(host):
    path = "/sys/class/net/cable/statistics/rx_bytes"
    return int(subprocess.run(["ip", "netns", "exec", host, "cat", path], capture_output=True, check=True).stdout)


def test_two_hosts_train_and_evaluate_as_one(hosts, tmp_path):
    photos = make_photos(tmp_path / "photos")
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "opt": "sgd", "max_steps": 2, "lr": 10.0, "device": "cpu"}
    options = {**QUICK, **plain}
    alone = train("classify", data=str(photos), run=str(tmp_path / "alone"), **options).path
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    run = tmp_path / "run"
    on_both(hosts, ["train", "classify", "--data", photos, "--run", run, *words], tmp_path)
    one, two = (read_safetensors(folder / "last.safetensors")[0] for folder in (alone, run))
    gradients = sum(4 * value.numel() for value in two.values())
    assert min(map(came_over_the_cable, hosts)) > 2 * gradients  # each update sends at least as much
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    said = on_both(hosts, ["eval", run, "--data", photos, "--device", "cpu", "--workers", "0"], tmp_path)
    assert "9 images of 3 classes" in said  # five on one host, four on the other


def test_a_process_that_dies_on_one_host_is_started_again(hosts, tmp_path):
    photos, run = make_photos(tmp_path / "photos"), tmp_path / "run"
    options = {**QUICK, "epochs": 400, "device": "cpu", "checkpoint_every": 2}
    train("classify", data=str(photos), run=str(run), max_steps=2, **options)
    meet = ["--max-restarts", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESS[0]}:29401", "--rdzv-id", "job"]
    launch = [
        [*meet, "--local-addr", address, "--rdzv-conf", f"is_host={int(first)}"]
        for address, first in zip(ADDRESS, (True, False), strict=True)
    ]
    agents = start(hosts, launch, ["train", "classify", "--resume", run, "--max-steps", 40], tmp_path)
    deadline = time.monotonic() + 240
    while RunFolder(run).usable_checkpoint()[1] < 6:
        assert time.monotonic() < deadline and agents[1].poll() is None, (tmp_path / f"{hosts[1]}.txt").read_text()
        time.sleep(0.2)
    # `ip netns exec` becomes the agent, whose youngest child is the process that trains.
    children = Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    wait(agents, hosts, tmp_path)
    assert RunFolder(run).usable_checkpoint()[1] == 40
    assert "exitcode: -9" in (tmp_path / f"{hosts[1]}.txt").read_text()
    assert (run / "log.txt").read_text().count("resuming") == 2
