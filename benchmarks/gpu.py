"""One GPU in eight minutes: the tests that need one, then speed, side by side. What `make gpu` runs.

Every part is a process, `pytest -m gpu` or `sgformer bench`, so that a kernel that fails takes nothing with it. A part
ends when its share of the time is over; what earlier parts leave of theirs is added. OUT gets gpu.md, a table of all
that was measured and the names of what did not fit, and gpu.png; OUT/PART has the bench's own files.

python benchmarks/gpu.py --out gpu
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sgformer.bench import Case
from sgformer.bench.cases import is_ours
from sgformer.core.files import make_folder, try_folder
from sgformer.viz.bench import draw_sizes

ROOT = Path(__file__).parent.parent
OURS, SWIN, PVT = "sgformer_s", "swin_tiny_patch4_window7_224", "pvt_v2_b2"
TOTAL = 480.0
RESERVE = 15.0  # seconds for table and picture, and for a part that is slow to stop
LATE = "no time was left"
WORDS = {"infer": "inference", "train": "training"}


@dataclass(frozen=True)
class Part:
    """Cases that take turns in one process: every network on every backend in every precision.

    Attributes:
        name: of its folder, too.
        seconds: its share of the time.
        memory: whether peak memory is measured instead of time worth showing; each case in a process of its own.
    """

    name: str
    seconds: float
    models: Sequence[str]
    image_size: int
    batch_size: int
    mode: str
    backends: Sequence[str]
    precisions: Sequence[str] = ("fp32", "bf16")
    memory: bool = False

    def cases(self, device: str) -> list[Case]:
        """Those that exist: our kernels are for our networks."""
        ways = itertools.product(self.models, self.backends, self.precisions)
        return [
            Case(model, self.image_size, self.batch_size, self.mode, backend, precision=precision, device=device)
            for model, backend, precision in ways
            if is_ours(model) or backend not in ("optimize", "triton")
        ]

    def command(self, device: str, out: Path) -> list[str]:
        options: dict[str, Sequence[Any]] = {
            "models": self.models, "image-size": [self.image_size], "batch-size": [self.batch_size],
            "mode": [self.mode], "backend": self.backends, "precision": self.precisions, "device": [device],
            "rounds": [1 if self.memory else 5], "seconds": [0 if self.memory else 0.2],
            "memory": [str(self.memory).lower()], "out": [out],
        }  # fmt: skip
        words = [[f"--{name}", *map(str, values)] for name, values in options.items()]
        return [sys.executable, "-m", "sgformer", "bench", *itertools.chain(*words)]


# The most important first. Batches have about as many pixels at every size. Compiling a network takes about a minute.
PARTS = (
    *(
        Part(f"{WORDS[mode]}-{size}", share, (OURS, SWIN, PVT), size, batch, mode, ("eager", "triton"))
        for size, batch, share in ((224, 32, 45), (1024, 2, 35), (512, 8, 35))
        for mode in ("infer", "train")
    ),
    Part("compile-inference", 45, (OURS,), 224, 32, "infer", ("compile",)),
    Part("compile-training", 45, (OURS,), 224, 32, "train", ("compile",), ("bf16",)),
    Part("compile-swin", 25, (SWIN,), 224, 32, "infer", ("compile",), ("bf16",)),
    Part("compile-pvt", 25, (PVT,), 224, 32, "infer", ("compile",), ("bf16",)),
    Part("memory", 20, (OURS,), 1024, 2, "train", ("eager", "triton"), ("bf16",), memory=True),
)
TEST_SECONDS = 75.0
#: The file has all tests with this mark. Several processes, because compiling kernels takes most of the time.
TESTS = [sys.executable, "-m", "pytest", "-q", "-n", "4", "-m", "gpu", "tests/test_gpu.py"]


def _interruptible() -> None:
    """In the child: what runs in the background inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_for(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """The exit status of a command; None if it was stopped after so many seconds, as by Ctrl-C, with what it has."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=_interruptible)
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


def measure(parts: Sequence[Part], device: str, folder: Path, deadline: float) -> list[dict[str, Any]]:
    """The bench's results, each with its ``part``; one without a time has its ``error``.

    Args:
        deadline: of all parts, by ``time.monotonic``.
    """
    found: list[dict[str, Any]] = []
    for i, part in enumerate(parts):
        out = make_folder(folder / part.name)
        (out / "bench.json").unlink(missing_ok=True)
        seconds = deadline - time.monotonic() - sum(later.seconds for later in parts[i + 1 :])
        print(f"-- {part.name}: at most {seconds:.0f} s", flush=True)
        status = run_for(part.command(device, out), seconds, out / "log.txt") if seconds > 0 else None
        told = json.loads((out / "bench.json").read_text())["results"] if (out / "bench.json").is_file() else []
        for case in part.cases(device):
            here = [r for r in told if all(r[key] == value for key, value in vars(case).items())]
            missing = LATE if status is None else f"the bench failed: see {part.name}/log.txt"
            result = here[0] if here else {**vars(case), "median_s": None, "error": missing}
            found.append({**result, "part": part.name, "memory_only": part.memory})
    return found


def eager_of(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> float | None:
    """The time of the same case, eager."""
    same = ("model", "image_size", "batch_size", "mode", "precision")
    for other in results:
        if other["backend"] == "eager" and not other["memory_only"] and all(other[k] == result[k] for k in same):
            return other["median_s"]
    return None


def table(results: Sequence[dict[str, Any]], tests: str, machine: str) -> str:
    lines = ["# One GPU", "", machine, "", f"`pytest -m gpu`: {tests}", ""]
    lines += ["| | pixels, batch | network | backend | precision | ms | range | images/s | speed-up over eager |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    missing = []
    for r in (r for r in results if not r["memory_only"]):
        if not r["median_s"]:
            missing.append(f"* {', '.join(words(r))}: {r['error']}")
            continue
        eager, times = eager_of(r, results), [1e3 * r[key] for key in ("median_s", "min_s", "max_s")]
        figures = [f"{times[0]:.3g}", f"{times[1]:.3g} to {times[2]:.3g}", f"{r['images_per_s']:.4g}"]
        figures.append(f"{eager / r['median_s']:.2f}" if eager else "-")
        lines.append(f"| {' | '.join([*words(r), *figures])} |")
    lines += ["", "| | pixels, batch | network | backend | precision | peak memory, MiB |", "|---|---|---|---|---|---|"]
    for r in (r for r in results if r["memory_only"]):
        peak = r.get("peak_memory_bytes")
        lines.append(f"| {' | '.join([*words(r), f'{peak / 2**20:.0f}' if peak else r['error'] or LATE])} |")
    return "\n".join([*lines, *(["", "Not measured:", "", *missing] if missing else [])]) + "\n"


def words(r: dict[str, Any]) -> list[str]:
    where = f"{r['image_size']}, {r['batch_size']}"
    return [WORDS[r["mode"]], where, f"`{r['model']}`", r["backend"], r["precision"]]


def picture(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Time per image over pixels: a panel for inference and for training, in each precision."""
    points: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        if r["median_s"] and not r["memory_only"]:
            title = f"{WORDS[r['mode']]}, {'float32' if r['precision'] == 'fp32' else r['precision']}"
            ms = 1e3 * r["median_s"] / r["batch_size"]
            points.setdefault(title, []).append(
                {"network": r["model"].split("_patch")[0], "way": r["backend"], "size": r["image_size"], "ms": ms}
            )
    if points:
        draw_sizes(points, out)


def describe() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "No GPU"
    return f"{name}, torch {torch.__version__}. Medians of interleaved rounds, one process for each part."


def run_tests(log: Path, seconds: float) -> str:
    """The last line that pytest printed."""
    status = run_for(TESTS, seconds, log)
    last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "printed nothing")
    return last.strip("= ") if status is not None else f"stopped after {seconds:.0f} s; so far: {last.strip('= ')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + TOTAL - RESERVE
    folder = Path(args.out).absolute()
    try_folder(folder)
    make_folder(folder)
    print(f"-- tests: at most {TEST_SECONDS:.0f} s", flush=True)
    tests = run_tests(folder / "tests.txt", TEST_SECONDS)
    print(tests)
    results = measure(PARTS, "cuda", folder, deadline)
    (folder / "gpu.md").write_text(table(results, tests, describe()))
    picture(results, folder / "gpu.png")
    print(f"wrote {folder / 'gpu.md'} and gpu.png")
    return 0 if "passed" in tests and "failed" not in tests and "error" not in tests else 1


if __name__ == "__main__":
    sys.exit(main())
