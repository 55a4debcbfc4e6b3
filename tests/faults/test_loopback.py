"""`--devices 2`: the processes of one machine listen on loopback only, and exchange tensors and JSON."""

import ipaddress
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import coco_scene
import pytest
from photos import QUICK, make_photos

from sgformer.training import ranks

pytest.importorskip("lightning")
ROOT = Path(__file__).parents[2]
FORBID = Path(__file__).with_name("forbid_pickles.py")
SKIP = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")


def start(words, folder, launch=()):
    """A process of `sgformer WORDS` in which nothing may be pickled between ranks, and its output's file."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "OMP_NUM_THREADS": "1"}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        environment.pop(name, None)
    out = folder / "out.txt"
    command = [sys.executable, *launch, "-m", "sgformer", *(["--"] if launch else []), "--plugin", FORBID, *words]
    with out.open("a") as text:
        return subprocess.Popen(list(map(str, command)), env=environment, stdout=text, stderr=subprocess.STDOUT), out


def words(**options):
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def family(pid):
    """The process and all below it."""
    found = [pid]
    for one in found:
        try:
            for thread in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def listening(pids):
    """The addresses on which processes listen."""
    sockets = set()
    for pid in pids:
        try:
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                sockets.add(os.readlink(handle))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                packed = bytes.fromhex(fields[1].partition(":")[0])
                words = [packed[i : i + 4][::-1] for i in range(0, len(packed), 4)]  # of the machine's byte order
                found.add(ipaddress.ip_address(b"".join(words)))
    return found


def is_torchrun(pid):
    """Whether a process is torchrun, or a child of it that is yet to become another program."""
    try:
        return b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def watched(process):
    """All addresses on which a process and those below it listened until its end, and its status."""
    seen, deadline = set(), time.monotonic() + 400
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline
            seen |= listening(family(process.pid))
            time.sleep(0.1)
    finally:
        process.kill()
    return seen, process.wait()


@SKIP
def test_what_listens_is_found():
    with socket.socket() as everywhere, socket.socket(socket.AF_INET6) as six:
        everywhere.bind(("", 0))
        everywhere.listen()
        six.bind(("::1", 0))
        six.listen()
        assert listening([os.getpid()]) >= {ipaddress.ip_address("0.0.0.0"), ipaddress.ip_address("::1")}


def classify(folder):
    return "classify", make_photos(folder / "data"), QUICK


def detect(folder):
    pytest.importorskip("pycocotools")
    boxes = [coco_scene.thing(10 * i, 3, [4.0, 5.0, 20.0, 10.0]) for i in (1, 2, 3, 4)]
    for split in ("train", "val"):
        coco_scene.write_coco(folder / "data", coco_scene.content(boxes, images=4), split)
    short = {name: QUICK[name] for name in ("model", "weights", "workers", "log_every")}
    return "detect", folder / "data", {**short, "image_size": "[64,96]", "batch_size": 2, "epochs": 1}


@SKIP
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "more"), [(classify, {"strategy": "fsdp", "max_steps": 2}), (detect, {})], ids=["fsdp", "ddp"]
)
def test_two_processes_listen_on_loopback_only_and_unpickle_nothing(task, more, tmp_path):
    name, data, options = task(tmp_path)
    run, two = tmp_path / "run", {"device": "cpu", "devices": 2}
    begin = ["train", name, *words(data=data, run=run, **{**options, **more}, **two)]
    commands = [begin, ["train", name, "--resume", run, *words(max_steps=3)]] if more else [begin]
    for command in commands:
        process, out = start(command, tmp_path)
        seen, status = watched(process)
        assert status == 0, out.read_text()[-3000:]
        assert seen and all(address.is_loopback for address in seen), seen


@SKIP
@pytest.mark.slow
def test_time_is_planned_by_two_processes_without_pickles(tmp_path):
    _, data, options = classify(tmp_path)
    options = {name: value for name, value in options.items() if name not in ("epochs", "warmup_epochs", "lr")}
    command = words(data=data, run=tmp_path / "run", minutes=0.01, device="cpu", devices=2, **options)
    process, out = start(["train", "classify", *command], tmp_path)
    seen, status = watched(process)
    assert status == 2 and "an update takes" in out.read_text(), out.read_text()[-3000:]  # measured by both
    assert seen and all(address.is_loopback for address in seen), seen


@SKIP
@pytest.mark.slow
def test_what_torchrun_starts_listens_on_loopback_only(tmp_path, monkeypatch):
    """torchrun's own store is torchrun's; as docs/distributed.md starts it, the processes have another."""
    _, data, options = classify(tmp_path)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = words(data=data, run=tmp_path / "run", device="cpu", **options)
    process, out = start(["train", "classify", *command], tmp_path, launch)
    seen, deadline = set(), time.monotonic() + 400
    while process.poll() is None:
        assert time.monotonic() < deadline
        seen |= listening([pid for pid in family(process.pid) if not is_torchrun(pid)])
        time.sleep(0.1)
    assert process.wait() == 0, out.read_text()[-3000:]
    assert seen and all(address.is_loopback for address in seen), seen


@SKIP
def test_the_store_is_bound_to_loopback():
    with socket.socket() as free:
        free.bind((ranks.LOOPBACK, 0))
        port = free.getsockname()[1]
    stores = []
    first = threading.Thread(target=lambda: stores.append(ranks.loopback_store(port, 0, 2)))
    first.start()
    second = ranks.loopback_store(port, 1, 2)
    first.join(60)
    second.set("here", "1")
    assert stores[0].get("here") == b"1"
    assert {address.is_loopback for address in listening([os.getpid()])} == {True}


def test_without_processes_a_value_is_what_it_becomes_among_them(tmp_path):
    assert ranks.gather((1, [2.5, None])) == [[1, [2.5, None]]]
    assert ranks.broadcast("x") == "x"
