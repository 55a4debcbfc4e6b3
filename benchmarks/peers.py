"""N beside its peers on Tiny ImageNet: every network from random weights, for the same time of a core, by two recipes.

    python benchmarks/peers.py TINY RUNS [--seeds 1] [--only 'resnet10t-*']

TINY has Tiny ImageNet's train/CLASS and val/CLASS. 25 training photographs of each class are kept aside and choose
between the recipes; the 10,000 validation photographs choose nothing. Both recipes are recipes/tiny_imagenet_n.yaml
from random weights, one with its Muon, the other with AdamW. Epochs are given, not minutes, so that another machine
trains as long: they come from rates that `sgformer train` reached with both, side by side, on one core of an Intel
Xeon with AMX (images/s below), and make `MINUTES`. What is done is not done again; what was interrupted goes on. Run
with OMP_NUM_THREADS=1, and with as many processes as there are cores, each with its own --only.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import random
from pathlib import Path

from real_tables import evaluate, figure, mean_and_spread, train_or_resume

MINUTES = 12
RECIPES = {"muon": ("--opt", "muon", "--lr", "1.2e-2"), "adamw": ("--opt", "adamw", "--lr", "8e-3")}
RATES = {  # images/s with each recipe
    "sgformer_n": {"muon": 196, "adamw": 218},
    "resnet10t": {"muon": 99, "adamw": 125},
    "mobilenetv4_conv_small": {"muon": 152, "adamw": 202},
    "pvt_v2_b0": {"muon": 142, "adamw": 158},
    "sgformer_t": {"muon": 82},  # what wider and deeper brings; scaled by N's rate beside it
}
ASIDE = 25
SHORT = ("--weights", "none", "--warmup-epochs", ".1", "--ema", ".99", "--workers", "0")


def keep_aside(tiny: Path, out: Path) -> None:
    """Link the photographs as train, val (kept aside) and test (Tiny ImageNet's validation)."""
    if out.exists():
        return
    for folder in sorted((tiny / "train").iterdir()):
        files = sorted(folder.iterdir())
        aside = set(random.Random(folder.name).sample(files, ASIDE))
        for file in files:
            target = out / ("val" if file in aside else "train") / folder.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    (out / "test").symlink_to((tiny / "val").resolve())


def train(network: str, recipe: str, seed: int, data: Path, run: Path) -> None:
    """Train, or go on; then evaluate on what was kept aside and on the validation photographs."""
    images = sum(1 for _ in (data / "train").glob("*/*"))
    epochs = 60 * MINUTES * RATES[network][recipe] / images
    begin = ["--config", str(Path(__file__).parent.parent / "recipes" / "tiny_imagenet_n.yaml"), *SHORT]
    begin += ["--data", str(data), "--model", network, *RECIPES[recipe], "--epochs", f"{epochs:.2f}"]
    train_or_resume("classify", run, [*begin, "--seed", str(seed)])
    for split in ("val", "test"):
        evaluate(run, "last", data, split, split)


def table(runs: Path) -> list[str]:
    """Each network and recipe, mean ± standard deviation over the seeds."""
    lines = ["| Network | Recipe | Epochs | Kept aside | Validation | Seeds |", "|---|---|---|---|---|---|"]
    for network, rates in RATES.items():
        for recipe, rate in rates.items():
            found = [file.parent.parent for file in sorted(runs.glob(f"{network}-{recipe}-*/test/metrics.json"))]
            cells = [
                mean_and_spread([figure(run / split / "metrics.json", ("top1",)) for run in found])
                for split in ("val", "test")
            ]
            if found:
                epochs = 60 * MINUTES * rate / (100_000 - 200 * ASIDE)
                lines.append(f"| {network} | {recipe} | {epochs:.2f} | {' | '.join(cells)} | {len(found)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tiny", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="*", help="a pattern of NETWORK-RECIPE-SEED")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    data = asked.runs / "data"
    keep_aside(asked.tiny, data)
    for seed in range(asked.seeds):
        for network, rates in RATES.items():
            for recipe in rates:
                run = asked.runs / f"{network}-{recipe}-{seed}"
                if fnmatch.fnmatch(run.name, asked.only) and not (run / "test" / "metrics.json").exists():
                    train(network, recipe, seed, data, run)
    print("\n".join(table(asked.runs)))


if __name__ == "__main__":
    main()
