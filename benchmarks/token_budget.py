"""What fewer and more key/value tokens cost and earn, without training again: accuracy, tokens, time.

    python benchmarks/token_budget.py sgformer_n --data TINY --image-size 128 --limit 2000 --out bench/tokens
    python benchmarks/token_budget.py runs/segment --data photos --out bench/tokens

Every budget is measured with the tokens where the network wants them, and with the same number cut without guidance, in
raster order. Times are of `sgformer.optimize` on one thread, interleaved, medians of seven rounds. Weights of a
classifier (top-1) or of a semantic segmentation whose images have one size (mIoU).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from reliance import classifier, paired, segmenter

import sgformer
from sgformer.data.image import height_and_width
from sgformer.explaining.base import ranked_by
from sgformer.models.backbone import SGFormer
from sgformer.models.load import find_weights, read_metadata
from sgformer.viz.style import COLOURS, figure

BUDGETS = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)


def measure(weights: str, given: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """The network, and a row for each budget: tokens, score with and without guidance, difference of the two."""
    if read_metadata(weights).get("task", "classify") == "segment":
        model, score = segmenter(weights, given.data, given.batch_size)
    else:
        model, score = classifier(weights, given.data, given.batch_size, given.image_size, given.limit)
    backbone = next(module for module in model.modules() if isinstance(module, SGFormer))
    side = side_of(weights, given)
    rows = []
    for budget in BUDGETS:
        backbone.set_token_budget(budget)
        tokens = sum(len(made) for made in backbone.inspect(torch.zeros(1, 3, side, side)).tokens.values())
        guided, right = score()
        with ranked_by(backbone, "uniform"):
            uniform, also = score()
        difference = "" if right is None else paired(right, also).strip(" |")
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


def draw(rows: list[dict[str, Any]], name: str, title: str, out: Path) -> None:
    """Score and time over the budget."""
    with figure(out, 9, 3.6) as fig:
        left, right = fig.subplots(1, 2)
        budgets = [row["budget"] for row in rows]
        for key, colour, label in (
            ("guided", COLOURS[0], "guided"),
            ("uniform", COLOURS[1], "the same number, uniform"),
        ):
            left.plot(budgets, [row[key] for row in rows], "o-", color=colour, label=label)
        right.plot(budgets, [row["ms"] for row in rows], "o-", color=COLOURS[0])
        left.set_ylabel(f"{name}, %")
        right.set_ylabel("ms an image, one thread")
        right.set_ylim(0)
        left.legend(frameon=False)
        left.set_title(title)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets], minor=False)
            axes.set_xlabel("key/value tokens, x those trained with")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="a run folder, .safetensors or sgformer_n")
    parser.add_argument("--data", required=True, help="the validation data, in the layout of the task")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--image-size", type=int, help="classifiers: pixels; by default as trained")
    parser.add_argument("--limit", type=int, help="classifiers: so many images, drawn at random")
    parser.add_argument("--out", default="bench/tokens", help="folder for table and picture")
    given = parser.parse_args()
    weights = str(find_weights(given.weights))
    torch.set_num_threads(1)
    with torch.no_grad():
        backbone, rows = measure(weights, given)
        metadata = read_metadata(weights)
        side = side_of(weights, given)
        add_times(backbone, rows, side, 8)
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"budget-{side}.json").write_text(json.dumps(rows, indent=1))
    name = "mIoU" if metadata.get("task") == "segment" else "top-1"
    draw(rows, name, f"{Path(given.weights).name}, {side} pixels", folder / f"budget-{side}.png")
    print(f"| tokens x | key/value tokens, all blocks | {name} | uniform | guided minus uniform | ms an image |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['budget']:g} | {row['tokens']} | {row['guided']:.1f} | {row['uniform']:.1f} | {row['difference']} "
            f"| {row['ms']:.2f} |"
        )


if __name__ == "__main__":
    main()
