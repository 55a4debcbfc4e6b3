"""The tables of docs/results.md on others' photographs: every network as long, some ten minutes of a core.

    python benchmarks/real_tables.py DATA RUNS [--only 'clothing10-144-ours-*']

DATA holds clothing10-144 and imagenette-tenth (train, val and test, with a folder for each class), nuclei (COCO's
layout), ccp-240 (ADE20K's), and tf_efficientnet_lite0.safetensors, the ImageNet weights of the yardstick. Epochs are
given, not minutes, so that another machine trains as long: they come from rates measured side by side on one core,
for the classifiers at 128 pixels and batch 32, for detection and segmentation from the first minute of each training
(3.0, 2.7, 2.9 and 2.3 images/s on nuclei for N, resnet10t, pvt_v2_b0 and lite0; 7.9, 5.9, 6.8 and 5.7 on CCP). All
else are the defaults that `sgformer train` takes from the data. What is done is not done again; what was interrupted
goes on. Run with OMP_NUM_THREADS=1, and with as many processes as there are cores, each with its own --only.
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
class DataSet:
    """What to do with a data set: it is trained for so many epochs by network.

    Attributes:
        split, weights: what the figures are of: images that chose nothing, so either of a third split, by the best
            epoch on the second, or of the second, by the last epoch.
        figures: their titles, and where `metrics.json` holds them.
    """

    task: str
    epochs: dict[str, float]
    split: str
    weights: str
    figures: dict[str, tuple[str, ...]]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    model: str
    weights: str
    seeds: int


CLASSIFIED = {"split": "test", "weights": "best", "figures": {"Top-1": ("top1",)}, "options": ("--image-size", "128")}
DATA_SETS = {
    "clothing10-144": DataSet(
        "classify", {"ours": 8, "scratch": 8, "resnet10t": 5, "pvt": 6, "lite0": 3}, **CLASSIFIED
    ),
    "imagenette-tenth": DataSet(
        "classify", {"ours": 27, "scratch": 27, "resnet10t": 16, "pvt": 19, "lite0": 9}, **CLASSIFIED
    ),
    "nuclei": DataSet(
        "detect",
        {"ours": 4, "scratch": 4, "resnet10t": 3.5, "pvt": 3.8, "lite0": 3},
        "val",
        "last",
        {"Box AP": ("box", "AP"), "Mask AP": ("mask", "AP"), "Mask AP50": ("mask", "AP50")},
    ),
    "ccp-240": DataSet(
        "segment",
        {"ours": 8, "scratch": 8, "resnet10t": 5.9, "pvt": 6.9, "lite0": 5.7},
        "val",
        "last",
        {"mIoU": ("miou",), "Pixel accuracy": ("pixel_accuracy",)},
        ("--val-every", "202"),
    ),
}
NETWORKS = {
    "ours": Network("sgformer_n", "sgformer_n", 3),
    "scratch": Network("sgformer_n", "none", 3),
    "resnet10t": Network("resnet10t", "none", 1),
    "pvt": Network("pvt_v2_b0", "none", 1),
    "lite0": Network("tf_efficientnet_lite0", "tf_efficientnet_lite0.safetensors", 1),
}


def train_or_resume(task: str, run: Path, begin: list[str]) -> None:
    """`sgformer train` with these options, or on from where it was interrupted; nothing if it has ended."""
    if (run / "report.md").exists():  # written last
        return
    options = ["--resume", str(run)] if any(run.glob("checkpoints/*.ckpt")) else [*begin, "--run", str(run)]
    subprocess.run([sys.executable, "-m", "sgformer", "train", task, *options], check=True)


def evaluate(run: Path, weights: str, data: Path, split: str, out: str) -> None:
    """`sgformer eval` of a run's best or last weights."""
    asked = ["--data", str(data), "--split", split, "--workers", "0", "--out", str(run / out)]
    command = [sys.executable, "-m", "sgformer", "eval", str(run / f"{weights}.safetensors"), *asked]
    subprocess.run(command, check=True)


def mean_and_spread(values: list[float]) -> str:
    """Of percentages: mean ± standard deviation, for a table."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} %" if values else ""


def train(network: Network, given: DataSet, epochs: float, seed: int, data: Path, run: Path) -> None:
    """Train, or go on; then evaluate."""
    weights = data.parent / network.weights if "." in network.weights else network.weights
    begin = ["--data", str(data), "--model", network.model, "--weights", str(weights)]
    begin += ["--epochs", str(epochs), "--seed", str(seed), "--workers", "0", *given.options]
    train_or_resume(given.task, run, begin)
    evaluate(run, given.weights, data, given.split, "test")


def figure(file: Path, keys: tuple[str, ...]) -> float:
    """A figure of `metrics.json`, in percent."""
    value = json.loads(file.read_text())
    for key in keys:
        value = value[key]
    return 100 * value


def table(runs: Path, name: str) -> list[str]:
    """Each figure, mean ± standard deviation over the seeds."""
    given = DATA_SETS[name]
    lines = [f"| {name} | Epochs | {' | '.join(given.figures)} | Seeds |", "|---" * (3 + len(given.figures)) + "|"]
    for network, epochs in given.epochs.items():
        found = sorted(runs.glob(f"{name}-{network}-*/test/metrics.json"))
        cells = []
        for keys in given.figures.values():
            cells.append(mean_and_spread([figure(file, keys) for file in found]))
        if found:
            lines.append(f"| {network} | {epochs} | {' | '.join(cells)} | {len(found)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", default="*", help="a pattern of DATASET-NETWORK-SEED")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for seed in range(3):
        for name, given in DATA_SETS.items():
            for network, epochs in given.epochs.items():
                run = asked.runs / f"{name}-{network}-{seed}"
                wanted = seed < NETWORKS[network].seeds and fnmatch.fnmatch(run.name, asked.only)
                if wanted and not (run / "test" / "metrics.json").exists():
                    train(NETWORKS[network], given, epochs, seed, asked.data / name, run)
    print("\n\n".join("\n".join(table(asked.runs, name)) for name in DATA_SETS))


if __name__ == "__main__":
    main()
