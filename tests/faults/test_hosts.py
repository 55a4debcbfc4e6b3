"""Two hosts: network namespaces of their own with a cable between them, and nothing else to talk over.

Needs Linux, root and `ip` (Debian's iproute2); skips itself where namespaces are not permitted.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from photos import QUICK, make_photos

from sgformer.api import train_classifier
from sgformer.checkpoint import read_safetensors

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


def on_both(hosts, words, out):
    """Run `sgformer WORDS` as one job on both hosts; returns what the first one said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", ADDRESS[0], "--master-port", "29400"]
    agents, said = [], [out / f"{name}.txt" for name in hosts]
    for rank, (name, text) in enumerate(zip(hosts, said, strict=True)):
        command = [sys.executable, "-m", "torch.distributed.run", *launch, "--node-rank", str(rank)]
        command = ["ip", "netns", "exec", name, *command, "-m", "sgformer", "--", *map(str, words)]
        agents.append(subprocess.Popen(command, env=environment, stdout=text.open("w"), stderr=subprocess.STDOUT))
    try:
        statuses = [agent.wait(timeout=400) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert statuses == [0, 0], "\n".join(text.read_text()[-3000:] for text in said)
    return said[0].read_text()


def came_over_the_cable(host):
    path = "/sys/class/net/cable/statistics/rx_bytes"
    return int(subprocess.run(["ip", "netns", "exec", host, "cat", path], capture_output=True, check=True).stdout)


def test_two_hosts_train_and_evaluate_as_one(hosts, tmp_path):
    photos = make_photos(tmp_path / "photos")
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "opt": "sgd", "max_steps": 2, "lr": 10.0, "device": "cpu"}
    options = {**QUICK, **plain}
    alone = train_classifier(data=str(photos), run=str(tmp_path / "alone"), **options).path
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
