"""The COCO metrics of boxes, masks and keypoints, by pycocotools on the annotation file itself, and their files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sgformer.core.errors import require
from sgformer.core.files import make_folder, write_json, write_text
from sgformer.core.parse import read_json, read_rows, read_table
from sgformer.training.report import class_tables, csv_text, facts_table, show
from sgformer.viz.detection import draw_precision_recall

#: The twelve numbers in pycocotools' order: average precision and recall, by IoU, object size and detections per image.
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
#: The ten of keypoints, which tell no small objects and no numbers of detections apart.
OF_KEYPOINTS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")


class Kind(NamedTuple):
    """pycocotools' word for what is measured, its entry in a result, its numbers, and the name of the last recall."""

    iou_type: str
    entry: str
    numbers: tuple[str, ...]
    recall: str


KINDS = {
    "box": Kind("bbox", "bbox", NUMBERS, "AR100"),
    "mask": Kind("segm", "segmentation", NUMBERS, "AR100"),
    "keypoints": Kind("keypoints", "keypoints", OF_KEYPOINTS, "AR"),
}
#: Minimum confidence of the detections that count in the score of an image.
CONFIDENT = 0.5


@dataclass(frozen=True)
class DetectionEvaluation:
    """The metrics of a detector on a set of images.

    Attributes:
        box, mask: the twelve numbers by name, fractions, NaN where there is nothing to measure (no object of a size);
            `mask` is empty for boxes only.
        classes: one row per class: name, objects, and `box_AP`, `box_AP50`, `box_AR100` (and `mask_...`,
            `keypoints_...`), None if the class has no object.
        images, objects: their counts, without crowd regions.
        skipped: one line for each unreadable image that was left out.
        precision: by kind, (classes, 101) precision at IoU .5 over recall 0, .01 ... 1; NaN where a
            class has no object.
        image_scores: by image id, F1 of its confident detections at IoU .5 or, of keypoints, at OKS .5 (similarity);
            NaN without objects and detections.
        results: by kind, detections in COCO's results format.
        keypoints: the ten numbers by name, if there are keypoints.
    """

    box: dict[str, float]
    mask: dict[str, float]
    classes: list[dict[str, Any]]
    images: int
    objects: int
    skipped: tuple[str, ...] = ()
    precision: dict[str, np.ndarray] = field(default_factory=dict)
    image_scores: dict[Any, float] = field(default_factory=dict)
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    keypoints: dict[str, float] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, dict[str, float]]:
        """The numbers by kind: "box", and "mask" or "keypoints" if there are some; the last one is the main one."""
        others = {"mask": self.mask, "keypoints": self.keypoints}
        return {"box": self.box, **{kind: numbers for kind, numbers in others.items() if numbers}}

    def metrics(self) -> dict[str, float]:
        """What training logs: `box_ap`, `box_ap50`, `box_ap75` and the like for masks and keypoints; 0 where nothing is
        measured."""
        return {
            f"{kind}_{name.lower()}": 0.0 if math.isnan(values[name]) else values[name]
            for kind, values in self.kinds.items()
            for name in NUMBERS[:3]
        }

    def but(self, skipped: Sequence[str]) -> DetectionEvaluation:
        """A copy that lists these images as skipped."""
        return dataclasses.replace(self, skipped=tuple(skipped))

    def to_json(self) -> dict[str, Any]:
        """All but the detections, in types that JSON has; see `of_json`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "results"}
        curves = {kind: precision.tolist() for kind, precision in self.precision.items()}
        keys = [key.item() if isinstance(key, np.generic) else key for key in self.image_scores]
        scores = list(zip(keys, self.image_scores.values(), strict=True))
        return {**values, "precision": curves, "image_scores": scores}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> DetectionEvaluation:
        """The evaluation of `to_json`."""
        curves = {kind: np.array(precision) for kind, precision in values["precision"].items()}
        scores, skipped = dict(values["image_scores"]), tuple(values["skipped"])
        return cls(**{**values, "precision": curves, "image_scores": scores, "skipped": skipped})

    def summary(self) -> dict[str, Any]:
        """The numbers by name, as `metrics.json` holds them (NaN is null there)."""
        return {
            **self.kinds,
            "images": self.images,
            "objects": self.objects,
            "skipped": list(self.skipped),
        }

    def headline(self) -> str:
        """The result in one line."""
        return "   ".join(
            f"{kind} AP {_percent(values['AP'])} (AP50 {_percent(values['AP50'])}, AP75 {_percent(values['AP75'])})"
            for kind, values in self.kinds.items()
        )

    def counted(self) -> str:
        """The size of the split."""
        return f"{self.images} images, {self.objects} objects of {len(self.classes)} classes"

    def table(self) -> str:
        """All numbers in columns, for a terminal."""
        width = max(map(len, ("mask", *self.kinds))) + 3
        lines: list[str] = []
        for names, group in _grouped(self.kinds):
            lines.append(" " * width + "".join(f"{name:>7}" for name in names))
            for kind, values in group.items():
                lines.append(f"{kind:<{width}}" + "".join(f"{_percent(values[name]):>7}" for name in names))
        return "\n".join(lines)

    def write(self, folder: str | os.PathLike[str], picture: bool = True) -> None:
        """`metrics.json`, `classes.csv`, `results_box.json` (and `_mask`, `_keypoints`), and on request
        `precision_recall.png`."""
        folder = make_folder(folder)
        write_json(folder / "metrics.json", self.summary())
        if self.classes:
            write_text(
                folder / "classes.csv", csv_text(list(self.classes[0]), [list(r.values()) for r in self.classes])
            )
        for kind, results in self.results.items():
            write_json(folder / f"results_{kind}.json", results, indent=None)
        if self.image_scores:
            rows = [[key, _blank(value)] for key, value in self.image_scores.items()]
            write_text(folder / "images.csv", csv_text(["image_id", "f1"], rows))
        if self.precision:
            names = [row["class"] for row in self.classes]
            for kind, precision in self.precision.items():
                rows = [
                    [name, *(_blank(v) for v in line)] for name, line in zip(names, precision.tolist(), strict=True)
                ]
                header = ["class \\ recall", *(f"{r:.2f}" for r in np.linspace(0, 1, 101))]
                write_text(folder / f"precision_{kind}.csv", csv_text(header, rows))
            if picture:
                draw_precision_recall(self.precision, names, folder / "precision_recall.png")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> DetectionEvaluation:
        """Read what `write` wrote to `folder`, without the results and the scores of the images."""
        folder = Path(folder)
        numbers = read_json(folder / "metrics.json")
        classes = [
            {k: v if k == "class" else int(v) if k == "objects" else float(v) if v else None for k, v in row.items()}
            for row in read_table(folder / "classes.csv")
        ]
        precision = {}
        for kind in KINDS:
            if (folder / f"precision_{kind}.csv").is_file():
                lines = read_rows(folder / f"precision_{kind}.csv")[1:]
                precision[kind] = np.array([[float(v) if v else np.nan for v in line[1:]] for line in lines])
                if precision[kind].shape != (len(classes), 101):
                    raise ValueError(f"precision_{kind}.csv is not of {len(classes)} classes")
        box, mask, keypoints = (
            {name: math.nan if value is None else value for name, value in numbers.get(kind, {}).items()}
            for kind in KINDS
        )
        counts = numbers["images"], numbers["objects"], tuple(numbers["skipped"])
        return cls(box, mask, classes, *counts, precision=precision, keypoints=keypoints)


class CocoMetric:
    """Evaluates detections against a COCO annotation file, crowd regions and ignored objects included.

    Args:
        truth: the file's content (`data.coco.ground_truth`).
        classes: class names in the order of the class indices.
        category_ids: of each class in that file; None for a class that is not in it.
        masks: whether to evaluate masks besides boxes.
        sigmas: of keypoints, which are evaluated, too; see `data.keypoints`.
    """

    def __init__(
        self,
        truth: dict[str, Any],
        classes: Sequence[str],
        category_ids: Sequence[int | str | None],
        masks: bool,
        sigmas: Sequence[float] = (),
    ):
        self.classes, self.category_ids, self.sigmas = list(classes), list(category_ids), list(sigmas)
        self.kinds = ("box", *(("mask",) if masks else ()), *(("keypoints",) if sigmas else ()))
        self.truth = _index(truth)

    def evaluate(
        self, results: Sequence[Mapping[str, Any]], images: Sequence[Any], skipped: Sequence[str] = ()
    ) -> DetectionEvaluation:
        """The metrics of some results.

        Args:
            results: detections with `image_id`, `category_id`, `bbox` [x, y, width, height], `score` and, if masks or
                keypoints are evaluated, `segmentation` (RLE) or `keypoints` [x, y, anything, ...].
            images: ids of the evaluated images; others do not count.
            skipped: one line for each unreadable image.
        """
        objects = [a for a in self.truth.dataset["annotations"] if a["image_id"] in set(images) and not a["iscrowd"]]
        rows = [
            {"class": name, "objects": sum(a["category_id"] == key for a in objects)}
            for name, key in zip(self.classes, self.category_ids, strict=True)
        ]
        numbers: dict[str, dict[str, float]] = {}
        precision, written = {}, {}
        scores: dict[Any, float] = {}
        for kind in self.kinds:
            # A list each: if a result has a box, pycocotools takes the area of that as the mask's.
            others = {one.entry for name, one in KINDS.items() if name != kind}
            written[kind] = [{k: v for k, v in result.items() if k not in others} for result in results]
            evaluation = self._run(written[kind], images, kind)
            numbers[kind] = {n: _nan(v) for n, v in zip(KINDS[kind].numbers, evaluation.stats.tolist(), strict=True)}
            precision[kind] = self._per_class(evaluation, rows, kind)
            if kind == ("keypoints" if self.sigmas else "box"):
                scores = image_scores(evaluation)
        return DetectionEvaluation(
            numbers["box"],
            numbers.get("mask", {}),
            rows,
            len(images),
            len(objects),
            tuple(skipped),
            precision,
            scores,
            written,
            numbers.get("keypoints", {}),
        )

    def _run(self, results: list[dict[str, Any]], images: Sequence[Any], kind: str) -> Any:
        cocoeval = require("pycocotools.cocoeval", "detect")
        with contextlib.redirect_stdout(io.StringIO()):
            # loadRes fails on an empty list; an index without annotations is equivalent.
            empty = {**self.truth.dataset, "annotations": []}
            # It also modifies its argument.
            detections = self.truth.loadRes([dict(r) for r in results]) if results else _index(empty)
            evaluation = cocoeval.COCOeval(self.truth, detections, KINDS[kind].iou_type)
            if kind == "keypoints":
                evaluation.params.kpt_oks_sigmas = np.array(self.sigmas)
            evaluation.params.imgIds = sorted(images)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def _per_class(self, evaluation: Any, rows: list[dict[str, Any]], kind: str) -> np.ndarray:
        """Adds a kind's columns to the rows; returns precision at IoU .5 by class and recall."""
        place = {key: i for i, key in enumerate(evaluation.params.catIds)}
        precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, class), all sizes, most detections
        recall = evaluation.eval["recall"][..., 0, -1]  # (IoU, class)
        curves = np.full((len(rows), precision.shape[1]), np.nan)
        for i, (row, key) in enumerate(zip(rows, self.category_ids, strict=True)):
            k = place.get(key)
            there = k is not None and (precision[:, :, k] > -1).any()
            row[f"{kind}_AP"] = float(precision[:, :, k].mean()) if there else None
            row[f"{kind}_AP50"] = float(precision[0, :, k].mean()) if there else None
            row[f"{kind}_{KINDS[kind].recall}"] = float(recall[:, k].mean()) if there else None
            if there:
                curves[i] = precision[0, :, k]
        return curves


def image_scores(evaluation: Any) -> dict[Any, float]:
    """F1 per image at IoU .5 of detections of at least `CONFIDENT`, from an evaluated pycocotools COCOeval."""
    counts: dict[Any, np.ndarray] = {}
    everything = evaluation.params.areaRng[0]
    for entry in evaluation.evalImgs:
        if entry is None or entry["aRng"] != everything:
            continue
        confident = np.asarray(entry["dtScores"]) >= CONFIDENT
        counted = confident & ~entry["dtIgnore"][0].astype(bool)
        hits = int((counted & (entry["dtMatches"][0] > 0)).sum())
        objects = int((np.asarray(entry["gtIgnore"]) == 0).sum())
        counts.setdefault(entry["image_id"], np.zeros(3))[:] += (hits, counted.sum(), objects)
    return {
        image: float(2 * hits / (detections + objects)) if detections + objects else math.nan
        for image, (hits, detections, objects) in counts.items()
    }


def read_image_scores(folder: str | os.PathLike[str]) -> dict[str, float]:
    """Read the image scores that `DetectionEvaluation.write` wrote, by image id as text."""
    rows = read_table(Path(folder) / "images.csv")
    return {row["image_id"]: float(row["f1"]) if row["f1"] else math.nan for row in rows}


def report(
    model: str, result: DetectionEvaluation, facts: Mapping[str, Any], pictures: Sequence[tuple[str, str]]
) -> str:
    """Markdown: the numbers, facts about the run, classes from worst to best, pictures as (title, file)."""
    lines = [
        f"# {model}: " + ", ".join(f"{kind} AP {_percent(values['AP'])}" for kind, values in result.kinds.items()),
        "",
        f"{result.images} validation images, {result.objects} objects of {len(result.classes)} classes; "
        "numbers in percent, by pycocotools.",
        "",
    ]
    for names, group in _grouped(result.kinds):
        lines += ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        lines += [f"| {k} | " + " | ".join(_percent(values[n]) for n in names) + " |" for k, values in group.items()]
        lines.append("")
    lines += facts_table(facts)
    kind = list(result.kinds)[-1]
    ranked = sorted((r for r in result.classes if r[f"{kind}_AP"] is not None), key=lambda r: r[f"{kind}_AP"])
    columns = [column for column in (result.classes[0] if result.classes else ()) if column not in ("class", "objects")]
    lines += class_tables(
        ["Class", "Objects", *(c.replace("_", " ") for c in columns)],
        [[r["class"], r["objects"], *(_percent(r[c]) for c in columns)] for r in ranked],
    )
    return "\n".join([*lines, *show(pictures)])


def _grouped(kinds: Mapping[str, dict[str, float]]) -> list[tuple[tuple[str, ...], dict[str, dict[str, float]]]]:
    """The kinds that have the same numbers, together."""
    groups: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for kind, values in kinds.items():
        groups.setdefault(KINDS[kind].numbers, {})[kind] = values
    return list(groups.items())


def _index(dataset: dict[str, Any]) -> Any:
    """A pycocotools COCO of the content of a file."""
    coco = require("pycocotools.coco", "detect").COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _nan(value: float) -> float:
    return math.nan if value < 0 else value


def _blank(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


read = DetectionEvaluation.read
