"""What fewer and more key/value tokens cost and earn, without training again: accuracy, tokens, time, memory.

    python benchmarks/token_budget.py sgformer_n --data TINY --image-size 128 --limit 2000 --out bench/tokens
    python benchmarks/token_budget.py runs/segment --data photos --out bench/tokens
    python benchmarks/token_budget.py runs/detect --data coco --out bench/tokens

Every budget is measured with the tokens where the network wants them, and with the same number cut without guidance, in
raster order. Times are of `sgformer.optimize` for the backbone on one thread, interleaved, medians of seven rounds;
memory is the peak of a batch of eight in a process of its own. Weights of a classifier (top-1, with paired
differences), a semantic segmentation (mIoU) or a detector (mask AP, box AP without masks).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reliance import classifier, paired
from torch import Tensor

import sgformer
from sgformer.bench import Case
from sgformer.bench.memory import peak_memory
from sgformer.data.image import height_and_width
from sgformer.explaining.base import ranked_by
from sgformer.models.backbone import SGFormer
from sgformer.models.load import find_weights, read_metadata, save_weights
from sgformer.viz.style import COLOURS, figure

BUDGETS = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)
Score = Callable[[float, bool], tuple[float, Tensor | None]]


def of_a_classifier(weights: str, given: argparse.Namespace) -> Score:
    """(budget, uniform or not) -> top-1 in percent, and which images are right."""
    model, score = classifier(weights, given.data, given.split, given.batch_size, given.image_size, given.limit)

    def at(budget: float, uniform: bool) -> tuple[float, Tensor | None]:
        sgformer.set_token_budget(model, budget)
        with ranked_by(model, "uniform" if uniform else None):
            return score()

    return at


def of_a_dense_network(weights: str, given: argparse.Namespace, folder: str) -> Score:
    """(budget, uniform or not) -> mIoU or AP in percent; a copy of the weights is written to `folder`."""
    model = sgformer.load_model(weights)
    model.architecture["backbone"]["config"]["significance"] = "uniform"
    copy = f"{folder}/uniform.safetensors"
    save_weights(model, copy, model.metadata)

    def at(budget: float, uniform: bool) -> tuple[float, Tensor | None]:
        found = sgformer.evaluate(copy if uniform else weights, given.data, split=given.split, tokens=budget, workers=0)
        return 100 * (found.miou if hasattr(found, "miou") else (found.mask or found.box)["AP"]), None

    return at


def measure(weights: str, given: argparse.Namespace) -> tuple[SGFormer, list[dict[str, Any]]]:
    """The backbone, and a row for each budget: tokens, score with and without guidance, difference of the two."""
    backbone = next(module for module in sgformer.load_model(weights).modules() if isinstance(module, SGFormer))
    side, rows = side_of(weights, given), []
    with tempfile.TemporaryDirectory() as folder:
        dense = read_metadata(weights).get("task", "classify") != "classify"
        score = of_a_dense_network(weights, given, folder) if dense else of_a_classifier(weights, given)
        for budget in BUDGETS:
            backbone.set_token_budget(budget)
            tokens = sum(len(made) for made in backbone.inspect(torch.zeros(1, 3, side, side)).tokens.values())
            guided, right = score(budget, False)
            uniform, also = score(budget, True)
            difference = f"{guided - uniform:+.1f}" if right is None else paired(right, also).strip(" |")
            rows.append(
                {"budget": budget, "tokens": tokens, "guided": guided, "uniform": uniform, "difference": difference}
            )
            print(rows[-1], flush=True)
    return backbone, rows


def side_of(weights: str, given: argparse.Namespace) -> int:
    """Pixels: those given, or as trained."""
    return given.image_size or max(height_and_width(read_metadata(weights).get("image_size", 224)))


def add_times(backbone: Any, rows: list[dict[str, Any]], side: int, batch: int, rounds: int = 7) -> None:
    """Milliseconds an image at each budget."""
    fast, image = sgformer.optimize(backbone), torch.randn(batch, 3, side, side)
    seconds: dict[float, list[float]] = {row["budget"]: [] for row in rows}
    for turn in range(rounds + 1):
        for budget, taken in seconds.items():
            fast.set_token_budget(budget)
            start = time.perf_counter()
            for _ in range(5):
                fast(image)
            if turn:
                taken.append((time.perf_counter() - start) / 5 / batch)
    for row in rows:
        row["ms"] = 1e3 * statistics.median(seconds[row["budget"]])


def add_memory(name: str, rows: list[dict[str, Any]], side: int, batch: int) -> None:
    """MiB that the backbone needs for a batch at each budget, weights included."""
    for row in rows:
        case = Case(name, side, batch, backend="optimize", threads=1, tokens=row["budget"])
        row["mib"] = peak_memory(case) / 2**20


def draw(rows: list[dict[str, Any]], name: str, title: str, out: Path) -> None:
    """Score, time and memory over the budget."""
    with figure(out, 12, 3.6) as fig:
        left, right, far = fig.subplots(1, 3)
        budgets = [row["budget"] for row in rows]
        for key, colour, label in (
            ("guided", COLOURS[0], "guided"),
            ("uniform", COLOURS[1], "the same number, uniform"),
        ):
            left.plot(budgets, [row[key] for row in rows], "o-", color=colour, label=label)
        right.plot(budgets, [row["ms"] for row in rows], "o-", color=COLOURS[0])
        left.set_ylabel(f"{name}, %")
        right.set_ylabel("ms an image, one thread")
        far.plot(budgets, [row["mib"] for row in rows], "o-", color=COLOURS[0])
        far.set_ylabel("MiB, eight images")
        right.set_ylim(0)
        far.set_ylim(0)
        left.legend(frameon=False)
        left.set_title(title)
        for axes in (left, right, far):
            axes.set_xscale("log", base=2)
            axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets], minor=False)
            axes.set_xlabel("key/value tokens, x those trained with")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="a run folder, .safetensors or sgformer_n")
    parser.add_argument("--data", required=True, help="the validation data, in the layout of the task")
    parser.add_argument("--split", default="val", help="of the data")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--image-size", type=int, help="classifiers: pixels; by default as trained")
    parser.add_argument("--limit", type=int, help="classifiers: so many images, drawn at random")
    parser.add_argument("--out", default="bench/tokens", help="folder for table and picture")
    given = parser.parse_args()
    weights = str(find_weights(given.weights))
    torch.set_num_threads(1)
    with torch.no_grad():
        backbone, rows = measure(weights, given)
        side = side_of(weights, given)
        add_times(backbone, rows, side, 8)
    metadata = read_metadata(weights)
    add_memory(metadata.get("model", given.weights), rows, side, 8)
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    task = metadata.get("task", "classify")
    (folder / f"budget-{task}-{side}.json").write_text(json.dumps(rows, indent=1))
    name = {"classify": "top-1", "segment": "mIoU", "detect": "AP"}[task]
    draw(rows, name, f"{given.weights}, {side} pixels", folder / f"budget-{task}-{side}.png")
    print(f"| tokens x | key/value tokens, all blocks | {name} | uniform | guided minus uniform | ms an image | MiB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['budget']:g} | {row['tokens']} | {row['guided']:.1f} | {row['uniform']:.1f} | {row['difference']} "
            f"| {row['ms']:.2f} | {row['mib']:.0f} |"
        )


if __name__ == "__main__":
    main()
