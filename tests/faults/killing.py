"""Kills training processes with SIGKILL at chosen and at random moments, resumes them, and compares the ends.

A process that will be killed marks in shared memory what it is doing, so that the moment of every kill is known; the
killer, another process, waits for the beginning of a phase, then a random part of that phase's length.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from photos import make_photos

from sgformer.cli import main
from sgformer.models.checkpoint import read_safetensors

#: What a process may be killed in the middle of: (module, attribute).
PHASES = {
    "reading an image": ("sgformer.data.image", "_read"),
    "forward pass": ("sgformer.tasks.{task}.module", "{Task}.training_step"),
    "backward pass": ("lightning", "LightningModule.backward"),
    "update": ("lightning", "LightningModule.optimizer_step"),
    "averaging weights": ("timm.utils", "ModelEmaV3.update"),
    "validation": ("sgformer.tasks.{task}.module", "{Task}.validation_step"),
    "writing a checkpoint": ("sgformer.training.state_file", "StateIO.save_checkpoint"),
    "putting it in its place": ("sgformer.training.callbacks", "publish"),
    "saving weights": ("sgformer.training.callbacks", "save_weights"),
    "a row of metrics.csv": ("sgformer.training.callbacks", "RunLog._row"),
    "results of a validation": ("{report}", "{Report}.write"),
    "the report": ("sgformer.training.run_folder", "RunFolder.write"),
}
BETWEEN = "in between"
NAMES = [BETWEEN, *PHASES]

NET = ["--model", "sgformer_n", "--device", "cpu", "--drop-path", "0.2", "--log-every", "1", "--checkpoint-every", "2"]


@dataclass(frozen=True)
class Course:
    """A training run to break: a task, its data and its options."""

    task: str
    data: Path
    options: tuple[str, ...]

    @property
    def names(self) -> dict[str, str]:
        """What stands for the task's parts in `PHASES`."""
        return {
            "classify": {
                "task": "classify",
                "Task": "ClassificationModule",
                "report": "sgformer.tasks.classify.metrics",
                "Report": "Evaluation",
            },
            "detect": {
                "task": "detect",
                "Task": "DetectionModule",
                "report": "sgformer.tasks.detect.metrics",
                "Report": "DetectionEvaluation",
            },
            "segment": {
                "task": "segment",
                "Task": "SegmentationModule",
                "report": "sgformer.tasks.segment.metrics",
                "Report": "SegmentationEvaluation",
            },
        }[self.task]

    def begin(self, run: Path) -> list[str]:
        return ["train", self.task, "--data", str(self.data), "--run", str(run), *NET, *self.options]

    def resume(self, run: Path) -> list[str]:
        """As a user would: with --resume, unless nothing of the run was on the disk yet."""
        if (run / "config.yaml").exists():
            return ["train", self.task, "--resume", str(run)]
        return self.begin(run)


def classification(folder: Path, workers: int = 0) -> Course:
    """Nine updates, three validations; everything random is on."""
    data = folder / "photos"
    if not data.exists():
        make_photos(data)
    options = ("--image-size", "32", "--batch-size", "6", "--epochs", "3", "--warmup-epochs", "1", "--lr", "0.02")
    return Course("classify", data, (*options, "--workers", str(workers)))


def segmentation(folder: Path) -> Course:
    from sgformer.data.scenes import make_scenes

    data = folder / "ade20k"
    if not data.exists():
        make_scenes(data, 8, 2, image_size=32, layout="ade20k")
    size = ("--image-size", "32", "--head", "semantic-fpn", "--batch-size", "2", "--workers", "0")
    return Course("segment", data, (*size, "--steps", "8", "--val-every", "4", "--warmup-steps", "2"))


def detection(folder: Path) -> Course:
    from sgformer.data.scenes import make_scenes

    data = folder / "coco"
    if not data.exists():
        make_scenes(data, 6, 2, image_size=64, layout="coco")
    size = ("--image-size", "[64,64]", "--batch-size", "2", "--workers", "0", "--ema", "0.99")
    return Course("detect", data, (*size, "--epochs", "2", "--warmup-steps", "2"))


def patiently(look: Callable[[], bool], seconds: int) -> bool:
    """Call `look`, which waits a second, so many times: stopped together with what it waits for, it loses one."""
    return any(look() for _ in range(seconds))


# -- the process that is killed ---------------------------------------------------------------------------------------


class Trace:
    """Marks the phases; tells the killer when the one it waits for begins; keeps counts and lengths."""

    def __init__(self, course: Course, doing: Any, target: tuple[str, int] | None, tell: Any):
        self.doing, self.target, self.tell, self.process = doing, target, tell, os.getpid()
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        for name, (module, attribute) in PHASES.items():
            self._wrap(name, module.format(**course.names), attribute.format(**course.names))

    def _wrap(self, name: str, module: str, attribute: str) -> None:
        owner: Any = importlib.import_module(module)
        *outer, last = attribute.split(".")
        for part in outer:
            owner = getattr(owner, part)
        function = getattr(owner, last)

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            if os.getpid() != self.process:  # a data loader's worker
                return function(*args, **kwargs)
            before, self.doing.value = self.doing.value, NAMES.index(name)
            self.counts[name] += 1
            if self.target == (name, self.counts[name]):
                self.tell.send_bytes(b"!")
            start = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.monotonic() - start
                self.doing.value = before

        setattr(owner, last, traced)


def _train(course: Course, arguments: list[str], out: str, doing: Any, target: Any, tell: Any, notes: str) -> None:
    """What the process does: a command line, with its output in the file `out`."""
    torch.set_num_threads(1)
    with open(out, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    trace = Trace(course, doing, target, tell)
    start = time.monotonic()
    status = main(arguments)
    numbers = {"counts": trace.counts, "seconds": trace.seconds, "whole": time.monotonic() - start}
    Path(notes).write_text(json.dumps(numbers))
    sys.stdout.flush()
    os._exit(status)


@functools.cache
def _context() -> Any:
    """Processes come from one that has imported everything and does nothing else: a start takes milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["killing", "lightning", "sgformer.tasks.classify.module", "sgformer.training.fit", "torchmetrics"]
    )
    return context


class Process:
    """A training process, and what it is doing."""

    def __init__(self, course: Course, arguments: list[str], out: Path, target: tuple[str, int] | None = None):
        context = _context()
        self.doing = context.RawValue("i", 0)
        self.heard, tell = context.Pipe(duplex=False)
        self.notes, self.out = out.with_suffix(".json"), out
        arguments = (course, arguments, str(out), self.doing, target, tell, str(self.notes))
        self.process = context.Process(target=_train, args=arguments)
        self.process.start()
        tell.close()

    def wait(self, timeout: int = 300) -> int:
        """The exit code; minus the signal's number, if one ended it.

        Raises:
            TimeoutError: it takes longer; what it printed is in the message.
        """
        if not patiently(lambda: self.process.join(1) or self.process.exitcode is not None, timeout):
            raise TimeoutError(f"still running: {self.out.read_text()[-2000:]}")
        return self.process.exitcode

    def wait_for_target(self, timeout: int = 300) -> bool:
        """Whether the awaited phase began (else the process ended)."""
        try:
            return patiently(lambda: self.heard.poll(1), timeout) and bool(self.heard.recv_bytes())
        except EOFError:
            return False

    def signal(self, number: int) -> str:
        """Send a signal; what the process was doing when it came."""
        os.kill(self.process.pid, number)
        return NAMES[self.doing.value]


# -- the killer -------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """A run that nobody disturbed, with how often its phases came and how long they took."""

    course: Course
    run: Path
    counts: dict[str, int]
    seconds: dict[str, float]
    whole: float


def undisturbed(course: Course, folder: Path) -> Reference:
    process = Process(course, course.begin(folder / "straight"), folder / "straight.txt")
    status = process.wait()
    assert status == 0, (folder / "straight.txt").read_text()
    return Reference(course, folder / "straight", **json.loads(process.notes.read_text()))


@dataclass
class Kills:
    """What became of the kills."""

    by_phase: Counter[str] = field(default_factory=Counter)
    survived: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)


def kill_and_resume(reference: Reference, folder: Path, rng: random.Random, phases: list[str], kills: Kills) -> None:
    """One run that is killed once per entry of `phases` (None of them may come true if the run is over before).

    A phase is waited for where it has a name in `PHASES`; "any time" is a moment of the whole run.
    """
    course, run, out = reference.course, folder / "run", folder / "run.txt"
    folder.mkdir(parents=True)
    hit: list[str] = []
    status = 0
    for phase in phases:
        target, length = None, reference.whole
        if phase in PHASES:
            count = reference.counts.get(phase, 0)
            if not count:
                continue
            target = (phase, rng.randint(1, max(1, count // 2)))
            length = reference.seconds[phase] / count
        process = Process(course, course.resume(run), out, target)
        if target and not process.wait_for_target():
            status = process.wait()  # it ended before
            break
        moment = time.monotonic() + rng.random() * length
        while time.monotonic() < moment and process.process.is_alive():
            time.sleep(min(0.0005, length / 10))
        with contextlib.suppress(ProcessLookupError):
            doing = process.signal(signal.SIGKILL)
        status = process.wait()
        if status == -signal.SIGKILL:
            hit.append(doing)
    if status in (0, -signal.SIGKILL):
        status = Process(course, course.resume(run), out).wait()
    problems = [f"ended with status {status}"] if status else differences(reference.run, run)
    kills.runs += 1
    kills.by_phase.update(hit)
    if problems:
        kills.lost.append(f"killed in {', '.join(hit)}: {'; '.join(problems)}; {out.read_text()[-2000:]}")
    else:
        kills.survived += len(hit)
        shutil.rmtree(folder)


# -- comparing two ends -----------------------------------------------------------------------------------------------


def differences(a: Path, b: Path) -> list[str]:
    """In what two finished runs differ to the bit; times and paths do not count."""
    found = [f"{path} left over" for path in b.rglob("*.tmp")]
    for name in ("last.safetensors", "best.safetensors"):
        one, other = (read_safetensors(run / name)[0] for run in (a, b))
        found += [f"{name}: {key}" for key in one if not torch.equal(one[key], other[key])]
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (a, b)]
    for part in ("global_step", "epoch", "state_dict", "optimizer_states"):
        found += [f"last.ckpt: {part}{where}" for where in _unequal(states[0][part], states[1][part])]
    averages = [state["callbacks"].get("WeightAverage") for state in states]
    found += [f"last.ckpt: averaged weights{where}" for where in _unequal(*averages)]
    tables = [_timeless(run / "metrics.csv") for run in (a, b)]
    found += [] if tables[0] == tables[1] else ["metrics.csv"]
    for path in sorted((a / "validation").glob("*.json")) + sorted((a / "validation").glob("*.csv")):
        same = path.read_bytes() == (b / "validation" / path.name).read_bytes()
        found += [] if same else [f"validation/{path.name}"]
    return found


def _timeless(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def _unequal(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [where]
        return [w for key in one for w in _unequal(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [where]
        return [w for i, pair in enumerate(zip(one, other, strict=True)) for w in _unequal(*pair, f"{where}.{i}")]
    return [] if one == other else [where]
