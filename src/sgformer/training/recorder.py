"""`--record-significance K`: the evolution of significance during training.

Files in the run folder's `significance/`:

    0001/00.png, 00.npz ...   a sheet and its arrays for each of a few fixed validation images, every K epochs
    evolution.csv             a row per record: two metrics over all blocks and images, and by stage
    00.png, 00.gif ...        at the end: each image's strip, and its animation
    evolution.png             at the end: the metrics as curves

An epoch is the interval between two validations; for segmentation that is `--val-every` updates.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from sgformer.core.errors import UserError, first_line
from sgformer.core.files import make_folder, remove_folder, replacing, write_text
from sgformer.explaining.localization import coverage, salient, stride_of
from sgformer.training.run_folder import RunFolder
from sgformer.training.task import Splits, Task
from sgformer.viz.evolution import draw_animation, draw_growth, draw_strip
from sgformer.viz.significance import draw_explanation, hybrid_of

IMAGES = 4


class SignificanceRecorder(Callback):
    """Records sheets of a few validation images, and at the end draws strips, animations and curves.

    Args:
        folder: the run folder; only the process that writes to it records.
        every: epochs between records; the first and the last epoch are always recorded.
        task: the run's task.
        splits: the run's data.
        images: number of validation images, evenly spaced.
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
        for record in self._records():  # of epochs that will be repeated
            if int(record.name) > trainer.current_epoch:
                remove_folder(record)
        for index in self.indices:
            image = self.val[index].image
            if image is not None:  # None: an unreadable file, with --bad-images skip
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
        remove_folder(folder)
        make_folder(folder)
        explainer = self.task.explainer(model, self.splits.metadata)
        for number, (_, image, mask) in enumerate(self._samples):
            explanation = explainer.explain(image)
            draw_explanation(explanation, folder / f"{number:02d}.png")
            arrays: dict[str, Any] = {"epoch": epoch, "step": step, "image": explanation.image}
            if mask is not None:
                arrays["objects"] = explainer.mask(torch.as_tensor(mask))
            for block in explanation.tokens:
                arrays[f"significance/{block}"] = explanation.significance[hybrid_of(block)]
                arrays[f"salient/{block}"] = salient(explanation, block)
            with replacing(folder / f"{number:02d}.npz") as part, part.open("wb") as file:
                np.savez_compressed(file, **arrays)
        write_evolution(self.path)


def records(path: Path) -> list[Path]:
    """The folders of the records, in chronological order."""
    return sorted(p for p in path.glob("[0-9]*") if p.name.isdecimal() and p.is_dir() and not p.is_symlink())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """A record's arrays by image."""
    images = {}
    for file in sorted(path.glob("*.npz")):
        try:
            # Maps of few values are small on the disk, but not so small.
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > 2**24 + 64 * file.stat().st_size:
                    raise ValueError("too large")
            with np.load(file) as arrays:
                images[file.stem] = dict(arrays)
            if not _is_record(images[file.stem]):
                raise ValueError("arrays of other kinds")
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise UserError(f"{file}: damaged ({first_line(error)}); remove {path}") from None
    if not images:
        raise UserError(f"{path}: holds no record; remove it")
    return images


def _history(path: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """The arrays of every record by image, in chronological order.

    Raises:
        UserError: a record is damaged, or of other maps than those before; names it.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for record in records(path):
        images = _read(record)
        for name, arrays in images.items():
            own = {key: value.shape for key, value in arrays.items()}
            if shapes.setdefault(name, own) != own:
                raise UserError(f"{record}: {name}.npz holds other maps than the records before; remove it")
        yield images


def _is_record(arrays: dict[str, Any]) -> bool:
    """Whether arrays are of the kinds and shapes that `Recorder` writes."""
    numbers, image = [arrays.get(name, np.zeros(1)) for name in ("epoch", "step")], arrays.get("image", np.zeros(1))
    maps = {name.partition("/")[2]: a for name, a in arrays.items() if name.startswith("salient/")}
    rankings = {name.partition("/")[2]: a for name, a in arrays.items() if name.startswith("significance/")}
    return (
        all(one.ndim == 0 and one.dtype.kind in "iu" for one in numbers)
        and (image.ndim, image.dtype) == (3, np.uint8)
        and image.shape[2] == 3
        and arrays.get("objects", image[..., 0]).ndim == 2
        and bool(maps)
        and all(re.fullmatch(r"[1-4]\.\d{1,3}", block) and one.dtype == bool for block, one in maps.items())
        and all(one.ndim == 2 and one.size and one.dtype.kind == "f" for one in rankings.values())
        and {block: one.shape for block, one in maps.items()} == {block: one.shape for block, one in rankings.items()}
    )


# scipy.stats.spearmanr is equal but no dependency here; torchmetrics' is slow with ties and gives 0 for constant maps.
def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; ties share their mean rank, NaN if either map is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[inverse.ravel()]

    first, second = ranks(a), ranks(b)
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def write_evolution(path: Path) -> list[dict[str, Any]]:
    """Write `evolution.csv` from the records; returns its rows.

    `rank_correlation`: of significance with the previous record, mean over blocks and images. `salient_energy`: the
    fraction of the salient tokens' area that lies on objects; `object_area`: the objects' fraction of the image, the
    expected value for random tokens. Empty where undefined. The first two also by stage.
    """
    rows: list[dict[str, Any]] = []
    previous: dict[str, dict[str, Any]] = {}
    for current in _history(path):
        first = next(iter(current.values()))
        metrics: dict[str, dict[str, list[float]]] = {"rank_correlation": {}, "salient_energy": {}, "object_area": {}}
        for name, arrays in current.items():
            for block in (key.split("/")[1] for key in arrays if key.startswith("salient/")):
                stage, chosen = block.split(".")[0], arrays[f"salient/{block}"]
                if name in previous:
                    pair = (one[f"significance/{block}"] for one in (previous[name], arrays))
                    metrics["rank_correlation"].setdefault(stage, []).append(rank_correlation(*pair))
                if "objects" in arrays:
                    covered = coverage(arrays["objects"], chosen.shape, stride_of(block))
                    metrics["salient_energy"].setdefault(stage, []).append(float(covered[chosen].mean()))
                    metrics["object_area"].setdefault(stage, []).append(float(covered.mean()))
        stages = sorted({key.split("/")[1].split(".")[0] for key in first if key.startswith("salient/")})
        row: dict[str, Any] = {"epoch": int(first["epoch"]), "step": int(first["step"])}
        row |= {kind: _mean([v for values in by.values() for v in values]) for kind, by in metrics.items()}
        for kind in ("rank_correlation", "salient_energy"):
            row |= {f"{kind}_stage{stage}": _mean(metrics[kind].get(stage, [])) for stage in stages}
        rows.append(row)
        previous = current
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
    """Draw strips, animations and curves of all records in a folder, if there are any."""
    history = list(_history(path))
    if not history:
        return
    for name in history[-1]:
        last = history[-1][name]
        blocks = {key.split("/")[1].split(".")[0]: key for key in last if key.startswith("significance/")}
        steps = [
            (f"{unit} {int(one[name][unit])}", {stage: one[name][key] for stage, key in blocks.items()})
            for one in history
            if name in one
        ]
        for draw, kind in ((draw_strip, "png"), (draw_animation, "gif")):
            draw(last["image"], steps, path / f"{name}.{kind}", last.get("objects"))
    draw_growth(write_evolution(path), path / "evolution.png", unit)
