"""The tables of docs/results.md on photographs that other people took: every network as long, twenty minutes of a core.

    python benchmarks/real_tables.py DATA RUNS [--only 'clothing10-ours-*']

DATA holds clothing10-144 and imagenette-tenth (train, val and test, with a folder for each class), and
tf_efficientnet_lite0.safetensors, the ImageNet weights of the yardstick. Epochs are given, not minutes, so that another
machine trains as long: they come from rates measured side by side (one thread, 128 pixels, batch 32). All else are the
defaults that `sgformer train` takes from the data. What is done is not done again; what was interrupted goes on. Run
with OMP_NUM_THREADS=1, and with as many processes as there are cores, each with its own --only.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Network:
    """What a row of a table trains, for so many epochs on clothing10 and on the tenth of Imagenette."""

    model: str
    weights: str
    epochs: tuple[int, int]
    seeds: int


DATA_SETS = ("clothing10-144", "imagenette-tenth")
NETWORKS = {
    "ours": Network("sgformer_n", "sgformer_n", (8, 27), 3),
    "scratch": Network("sgformer_n", "none", (8, 27), 3),
    "resnet10t": Network("resnet10t", "none", (5, 16), 1),
    "pvt": Network("pvt_v2_b0", "none", (6, 19), 1),
    "lite0": Network("tf_efficientnet_lite0", "tf_efficientnet_lite0.safetensors", (3, 9), 1),
}


def train(network: Network, data: Path, run: Path, epochs: int, seed: int) -> None:
    """Train, or go on; then evaluate on the test split, which chose nothing."""
    command = [sys.executable, "-m", "sgformer"]
    if not (run / "report.md").exists():  # written last
        if any(run.glob("checkpoints/*.ckpt")):
            begin = ["--resume", str(run)]
        else:
            weights = data.parent / network.weights if "." in network.weights else network.weights
            begin = ["--data", str(data), "--model", network.model, "--weights", str(weights), "--run", str(run)]
            begin += ["--epochs", str(epochs), "--seed", str(seed), "--image-size", "128", "--workers", "0"]
        subprocess.run([*command, "train", "classify", *begin], check=True)
    subprocess.run(
        [*command, "eval", str(run), "--data", str(data), "--split", "test", "--out", str(run / "test")], check=True
    )


def table(runs: Path, data: str) -> list[str]:
    """Top-1 on the test split and on what chose the epoch, mean ± standard deviation over the seeds."""
    lines = [f"| {data} | Epochs | Test | Seeds |", "|---|---|---|---|"]
    for name, network in NETWORKS.items():
        found = sorted(runs.glob(f"{data}-{name}-*/test/metrics.json"))
        scores = [100 * json.loads(file.read_text())["top1"] for file in found]
        if scores:
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            epochs = network.epochs[DATA_SETS.index(data)]
            lines.append(f"| {name} | {epochs} | {statistics.mean(scores):.1f}{spread} % | {len(scores)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", default="*", help="a pattern of DATASET-NETWORK-SEED")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for seed in range(3):
        for data in DATA_SETS:
            for name, network in NETWORKS.items():
                run = given.runs / f"{data}-{name}-{seed}"
                wanted = seed < network.seeds and fnmatch.fnmatch(run.name, given.only)
                if wanted and not (run / "test" / "metrics.json").exists():
                    train(network, given.data / data, run, network.epochs[DATA_SETS.index(data)], seed)
    print("\n\n".join("\n".join(table(given.runs, data)) for data in DATA_SETS))


if __name__ == "__main__":
    main()
