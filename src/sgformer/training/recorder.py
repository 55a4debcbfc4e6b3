"""`--record-significance K`: what the network looked at while it learned.

In the run's folder, `significance/`:

    0001/00.png, 00.npz ...   a sheet and its arrays for each of a fixed handful of validation images, every K epochs
    evolution.csv             a row per record: two numbers over all blocks and images, and by stage
    00.png, 00.gif ...        at the end: each image's strip, and the same animated
    evolution.png             at the end: the numbers as curves

An epoch is what lies between two validations; for segmentation that is `--val-every` updates.
"""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from sgformer.core.files import write_text
from sgformer.explaining.localization import coverage, salient, stride_of
from sgformer.training.run_folder import RunFolder
from sgformer.training.task import Splits, Task
from sgformer.viz.evolution import draw_animation, draw_growth, draw_strip
from sgformer.viz.significance import draw_explanation, hybrid_of

IMAGES = 4


class SignificanceRecorder(Callback):
    """Keeps sheets of a few validation images, and at the end strips, animations and curves.

    Args:
        folder: of the run; only the process that writes there records.
        every: epochs from one record to the next; the first and the last are always recorded.
        task: of the run.
        splits: of the run.
        images: how many validation images, spread evenly.
    """

    def __init__(self, folder: RunFolder, every: int, task: Task, splits: Splits, images: int = IMAGES):
        self.path, self.writes, self.every = folder.path / "significance", folder.writes, every
        self.task, self.splits, self.val = task, splits, splits.val
        count = min(images, len(self.val))
        self.indices = [i * len(self.val) // count + len(self.val) // (2 * count) for i in range(count)]
        self._samples: list[tuple[int, torch.Tensor, Any]] = []

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        if not self.writes:
            return
        for record in self._records():  # of epochs that will be made again
            if int(record.name) > trainer.current_epoch:
                shutil.rmtree(record)
        for index in self.indices:
            image = self.val[index].image
            if image is not None:  # an unreadable file, which --bad-images skip leaves out
                self._samples.append((index, image, self.task.objects(self.splits, index)))

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        epoch = trainer.current_epoch + 1
        last = trainer.should_stop or epoch == trainer.max_epochs
        if self.writes and self._samples and (epoch % self.every == 0 or epoch == 1 or last):
            self._record(task.eval_model, epoch, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        if self.writes:
            finish(self.path, self.task.unit)

    def _records(self) -> list[Path]:
        return records(self.path)

    def _record(self, model: Any, epoch: int, step: int) -> None:
        folder = self.path / f"{epoch:04d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        explainer = self.task.explainer(model, self.splits.metadata)
        for number, (_, image, mask) in enumerate(self._samples):
            seen = explainer.explain(image)
            draw_explanation(seen, folder / f"{number:02d}.png")
            arrays: dict[str, Any] = {"epoch": epoch, "step": step, "image": seen.image}
            if mask is not None:
                arrays["objects"] = explainer.mask(torch.as_tensor(mask))
            for block in seen.tokens:
                arrays[f"significance/{block}"] = seen.significance[hybrid_of(block)]
                arrays[f"salient/{block}"] = salient(seen, block)
            np.savez_compressed(folder / f"{number:02d}.npz", **arrays)
        write_numbers(self.path)


def records(path: Path) -> list[Path]:
    """Folders of the records, in the order of time."""
    return sorted(p for p in path.glob("[0-9]*") if p.is_dir())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Arrays of a record by image."""
    found = {}
    for file in sorted(path.glob("*.npz")):
        with np.load(file) as arrays:
            found[file.stem] = dict(arrays)
    return found


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, equal values sharing their mean rank; nan where one map is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place.ravel()]

    first, second = ranks(a), ranks(b)
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def write_numbers(path: Path) -> list[dict[str, Any]]:
    """`evolution.csv` from the records; returns its rows.

    `rank_correlation`: of significance with the record before, mean over blocks and images. `salient_energy`: share of
    salient tokens' area that lies in objects; `object_area`: the objects' share of the image, which is chance. Empty
    where they cannot be known. Each also by stage.
    """
    rows: list[dict[str, Any]] = []
    before: dict[str, dict[str, Any]] = {}
    for record in records(path):
        now = _read(record)
        first = next(iter(now.values()))
        numbers: dict[str, dict[str, list[float]]] = {"rank_correlation": {}, "salient_energy": {}, "object_area": {}}
        for name, arrays in now.items():
            for block in (key.split("/")[1] for key in arrays if key.startswith("salient/")):
                stage, chosen = block.split(".")[0], arrays[f"salient/{block}"]
                if name in before:
                    pair = (one[f"significance/{block}"] for one in (before[name], arrays))
                    numbers["rank_correlation"].setdefault(stage, []).append(rank_correlation(*pair))
                if "objects" in arrays:
                    covered = coverage(arrays["objects"], chosen.shape, stride_of(block))
                    numbers["salient_energy"].setdefault(stage, []).append(float(covered[chosen].mean()))
                    numbers["object_area"].setdefault(stage, []).append(float(covered.mean()))
        stages = sorted({key.split("/")[1].split(".")[0] for key in first if key.startswith("salient/")})
        row: dict[str, Any] = {"epoch": int(first["epoch"]), "step": int(first["step"])}
        row |= {kind: _mean([v for values in by.values() for v in values]) for kind, by in numbers.items()}
        for kind in ("rank_correlation", "salient_energy"):
            row |= {f"{kind}_stage{stage}": _mean(numbers[kind].get(stage, [])) for stage in stages}
        rows.append(row)
        before = now
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(path / "evolution.csv", text.getvalue(), newline="")
    return rows


def _mean(values: list[float]) -> float | str:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else ""


def finish(path: Path, unit: str) -> None:
    """Strips, animations and curves of all records in a folder; nothing where there is none."""
    found = [_read(record) for record in records(path)]
    if not found:
        return
    for name in found[-1]:
        last = found[-1][name]
        blocks = {key.split("/")[1].split(".")[0]: key for key in last if key.startswith("significance/")}
        steps = [
            (f"{unit} {int(one[name][unit])}", {stage: one[name][key] for stage, key in blocks.items()})
            for one in found
            if name in one
        ]
        for draw, kind in ((draw_strip, "png"), (draw_animation, "gif")):
            draw(last["image"], steps, path / f"{name}.{kind}", last.get("objects"))
    draw_growth(write_numbers(path), path / "evolution.png", unit)
