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
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from sgformer.explaining.explain import explainer_for
from sgformer.explaining.localization import coverage, salient, stride_of
from sgformer.training.run_folder import RunFolder
from sgformer.viz.evolution import draw_animation, draw_growth, draw_strip
from sgformer.viz.significance import draw_explanation, hybrid_of

IMAGES = 4

#: (index) -> the objects' pixels (H, W) bool on the validation sample of that index, or None where they are not known.
Known = Callable[[int], Any]


class SignificanceRecorder(Callback):
    """Keeps sheets of a few validation images, and at the end strips, animations and curves.

    Args:
        folder: of the run; only the process that writes there records.
        every: epochs from one record to the next; the first and the last are always recorded.
        val: data set of validation samples.
        metadata: of the weights.
        objects: tells where the objects are; asked once for each image.
        unit: "epoch" or "step", what records are called by.
        images: how many validation images, spread evenly.
    """

    def __init__(
        self, folder: RunFolder, every: int, val: Any, metadata: Any, objects: Known, unit: str, images: int = IMAGES
    ):
        self.path, self.writes, self.every, self.unit = folder.path / "significance", folder.writes, every, unit
        self.val, self.metadata, self.objects = val, metadata, objects
        count = min(images, len(val))
        self.indices = [i * len(val) // count + len(val) // (2 * count) for i in range(count)]
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
                self._samples.append((index, image, self.objects(index)))

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        epoch = trainer.current_epoch + 1
        last = trainer.should_stop or epoch == trainer.max_epochs
        if self.writes and self._samples and (epoch % self.every == 0 or epoch == 1 or last):
            self._record(task.eval_model, epoch, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        if self.writes:
            finish(self.path, self.unit)

    def _records(self) -> list[Path]:
        return records(self.path)

    def _record(self, model: Any, epoch: int, step: int) -> None:
        folder = self.path / f"{epoch:04d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        asked = explainer_for(model, self.metadata)
        for number, (_, image, mask) in enumerate(self._samples):
            seen = asked.see(image)
            draw_explanation(seen, folder / f"{number:02d}.png")
            arrays: dict[str, Any] = {"epoch": epoch, "step": step, "image": seen.image}
            if mask is not None:
                arrays["objects"] = asked.mask(torch.as_tensor(mask))
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
    unfinished = path / "evolution.tmp"
    unfinished.write_text(text.getvalue(), encoding="utf-8", newline="")
    os.replace(unfinished, path / "evolution.csv")
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
