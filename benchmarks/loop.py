"""What the training loop costs beside the step: images/s of `sgformer train` over those of forward and backward alone.

    python benchmarks/loop.py TINY

TINY has train/CLASS and val/CLASS. The bare step runs in one process on all cores, with the native kernels, on images
that lie in memory, and keeps the memory that it frees, or page faults would slow it down; `train` runs as its users
start it, with one process a core: reading and augmenting, the optimiser, averaged weights, logging and the exchange of
gradients included. Rounds alternate; the machine should be quiet.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import sgformer
from sgformer.training.optimizer import create_optimizer

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny_imagenet_n.yaml"
BATCH, CLASSES, STEPS = 128, 200, 45  # the batch at 64 pixels; fewer of larger ones


def keep_freed_memory() -> None:
    """Without it, a step alone spends a tenth of its time on page faults, and the loop looks cheaper than it is."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the largest that is allowed
    libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def seconds(step) -> float:
    """The median of eight calls, after two."""
    taken = []
    for _ in range(10):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def batch_of(size: int) -> int:
    """As many pixels an update at every size."""
    return max(2, BATCH * 64**2 // size**2)


def bare(size: int) -> tuple[float, dict[str, float]]:
    """Images/s of forward and backward; milliseconds that optimisers take in one process."""
    model = sgformer.create_model("sgformer_n", num_classes=CLASSES, img_size=size, coarse="global").train()
    sgformer.accelerate(model)
    batch = batch_of(size)
    images, targets = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))

    def step() -> None:
        model.zero_grad()
        cross_entropy(model(images), targets).backward()

    rate = batch / seconds(step)
    optimizers = {name: create_optimizer(model, opt=name, lr=1e-6) for name in ("muon", "adamw")}
    return rate, {name: 1000 * seconds(one.step) for name, one in optimizers.items()}


def train(data: str, size: int, opt: str, processes: int) -> float:
    """Images/s of the last third of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "sgformer", "train", "classify", "--config", str(RECIPE), "--data", data]
        command += ["--weights", "none", "--image-size", str(size), "--opt", opt, "--run", str(run)]
        command += ["--batch-size", str(batch_of(size))]
        command += ["--devices", str(processes), "--max-steps", str(STEPS), "--log-every", str(STEPS // 3)]
        subprocess.run(command, check=True, capture_output=True)
        with open(run / "metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["images_per_second"]]
        return float(next(row for row in rows if int(row["step"]) == STEPS)["images_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    keep_freed_memory()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    print("| pixels | bare step, images/s | train with | images/s | of the bare step | optimiser, ms |")
    print("|---" * 6 + "|")
    for size in given.sizes:
        plain, costs, trained = [], [], {"muon": [], "adamw": []}
        for _ in range(given.rounds):
            rate, cost = bare(size)
            plain.append(rate)
            costs.append(cost)
            for opt, rates in trained.items():
                rates.append(train(given.data, size, opt, cores))
        for opt, rates in trained.items():
            shares = sorted(100 * rate / alone for rate, alone in zip(rates, plain, strict=True))
            middle, alone = statistics.median(rates), statistics.median(plain)
            share = f"{statistics.median(shares):.0f} % ({shares[0]:.0f} to {shares[-1]:.0f})"
            cost = statistics.median(one[opt] for one in costs)
            print(f"| {size} | {alone:.0f} | {opt} | {middle:.0f} | {share} | {cost:.0f} |", flush=True)


if __name__ == "__main__":
    main()
