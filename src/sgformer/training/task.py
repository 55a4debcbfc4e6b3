"""What a task of computer vision brings along, for training and for everything done with its weights afterwards.

A task is a subclass of :class:`Task` in a folder of its own under `tasks/`. Training, command line, exports, the page
and ablations know this class alone. Its methods import what they need when they are called: the command line's help
needs words and options only, and exported files are used where torch is not installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from sgformer.core.errors import require
from sgformer.training.config import RunConfig


class Evaluation(Protocol):
    """The numbers of an evaluation."""

    skipped: tuple[str, ...]

    def write(self, folder: Any, picture: bool = True) -> None:
        """Files of the numbers in a folder, with pictures if asked for."""

    def headline(self) -> str:
        """The result in a line."""
        ...

    def table(self) -> str:
        """All numbers, for a terminal."""
        ...

    def counted(self) -> str:
        """What was measured on: `341 images of 10 classes`."""
        ...


@dataclass
class Splits:
    """The images of a run.

    Attributes:
        train, val: data sets of samples, indexed by (epoch, index).
        train_sampler: an `EpochSampler`; one pass of it is what lies between two validations.
        val_sampler: another one, that yields everything once.
        total_steps: updates of the whole schedule.
        steps_per_pass: updates that make a pass over the training images.
        collate: a list of samples -> a batch (images, targets, indices, skipped).
        val_collate: the same for validation.
        metadata: saved in the weights; `task`, `model`, `classes`, and what evaluation needs to know.
        about: a line on the data for the log and the report.
        size: of images, for the log.
    """

    train: Any
    val: Any
    train_sampler: Any
    val_sampler: Any
    total_steps: int
    steps_per_pass: float
    collate: Callable[[Sequence[Any]], Any]
    val_collate: Callable[[Sequence[Any]], Any]
    metadata: Mapping[str, Any]
    about: str
    size: str


class Task:
    """A task: its words, its options, and what it does at each step of a network's life.

    A subclass in `tasks/NAME/__init__.py` has the words. What it does stands in the files beside it, as functions of
    agreed names that the methods here call:

        config.py        Config
        data.py          open_data, maybe draw_batch, and objects where a sample's objects are known
        module.py        build
        metrics.py       read, maybe report
        predict.py       network, predict, evaluate, and finish where a run ends with pictures
        predict_onnx.py  predict, prepare
        show.py          line, to_json, draw
        explain.py       explainer, summary
        export.py        graph

    The first five and show.py make a task that is trained, measured and predicted with; `tests/tasks/toy` is the
    smallest. The others bring what their names say.

    Attributes:
        name: on the command line and in weights, e.g. "classify".
        title: in text, e.g. "classification".
        about: what `sgformer train NAME` does, a few words.
        description: the same in a sentence, which names the layout of the data.
        example: options of a typical training.
        data_help: what `--data` is to `sgformer eval`.
        eval_options, predict_options: options of `eval` and `predict` that not every task has, with underscores.
        score: the column of `metrics.csv` that ablations compare.
        unit: what a run's log counts in, "epoch" or "step".
        pictures: (title, file in the run's folder) for the report.
        written: what `eval` leaves in its folder, for the last line on the terminal.
        quantity: what the shares of `summary` are.
        extras: (package, extra of this package that installs it) that the task needs besides those of training.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    description: ClassVar[str]
    example: ClassVar[str]
    data_help: ClassVar[str]
    eval_options: ClassVar[frozenset[str]] = frozenset()
    predict_options: ClassVar[frozenset[str]] = frozenset()
    score: ClassVar[str]
    unit: ClassVar[str] = "epoch"
    pictures: ClassVar[Sequence[tuple[str, str]]] = ()
    written: ClassVar[str] = "tables"
    quantity: ClassVar[str] = "share"
    extras: ClassVar[Sequence[tuple[str, str]]] = ()

    def part(self, name: str) -> Any:
        """A file of the task's folder, imported now."""
        return importlib.import_module(f"{type(self).__module__}.{name}")

    def require(self) -> None:
        """Raise UserError if a package is missing that this task needs besides those of training."""
        for package, extra in self.extras:
            require(package, extra=extra)

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def Config(self) -> type[RunConfig]:
        """The settings of a run: the source of options, help and `config.yaml`."""
        return self.part("config").Config

    def splits(self, config: Any, weights: Any, batch: int, rank: int, world: int) -> Splits:
        """Open the data of a run.

        Args:
            config: all settings.
            weights: a `models.load.Weights` that the run starts from, or None.
            batch: images per forward pass on one process.
            rank, world: which of how many processes this is.

        Raises:
            UserError: the data is missing, or not as it should be; names the file or folder.
        """
        return self.part("data").open_data(config, weights, batch, rank, world)

    def module(self, config: Any, splits: Splits, weights: Any) -> Any:
        """The network to train, as a `TaskModule`; fresh, or from `weights`.

        Raises:
            UserError: no such network, or weights that do not fit it.
        """
        return self.part("module").build(config, splits, weights)

    def draw_batch(self, config: Any, splits: Splits, images: list[Any], targets: list[Any], out: Path) -> None:
        """A PNG of the first training samples as the network sees them, where the task draws one."""
        if draw := getattr(self.part("data"), "draw_batch", None):
            draw(config, splits, images, targets, out)

    def objects(self, splits: Splits, index: int) -> Any:
        """The objects' pixels (H, W) bool of a validation sample, or None where they are not known."""
        known = getattr(self.part("data"), "objects", None)
        return known(splits, index) if known else None

    def read_evaluation(self, folder: Path) -> Any:
        """What `Evaluation.write` left in a folder."""
        return self.part("metrics").read(folder)

    def report(self, model: str, result: Any, facts: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
        """Markdown of a finished run: the task's own, or the numbers, the facts and the pictures."""
        if own := getattr(self.part("metrics"), "report", None):
            return own(model, result, facts, pictures)
        from sgformer.training.report import facts_table, show

        lines = [f"# {model}: {result.headline()}", "", result.table(), "", result.counted(), "", *facts_table(facts)]
        return "\n".join([*lines, *show(pictures)])

    def scores(self, module: Any) -> tuple[str, ...]:
        """Columns of `metrics.csv` in the curves; the first one is what counts."""
        return (self.score,)

    def finish(self, folder: Path, splits: Splits, module: Any) -> None:
        """Add to the folder of the best validation when the run ends, on its first process."""
        if add := getattr(self.part("predict"), "finish", None):
            add(folder, splits, module)

    # -- trained weights ----------------------------------------------------------------------------------------------

    def network(self, weights: Any) -> Any:
        """The network of a `models.load.Weights`, in evaluation mode; `.metadata` is the file's.

        Raises:
            UserError: the tensors do not fit.
        """
        return self.part("predict").network(weights)

    def evaluate(self, weights: Any, data: Any, *, out: Any = None, **options: Any) -> Any:
        """Measure weights on a part of a data set, every image counted once.

        Args:
            weights: a `models.load.Weights`.
            data: the data set.
            out: folder for pictures that need the images; numbers are the caller's to write.
            options: of the task's `evaluate`.

        Raises:
            UserError: weights or data are invalid, or do not go together.
        """
        return self.part("predict").evaluate(weights, data, out=out, **options)

    def predict(self, weights: Any, sources: Sequence[Any], **options: Any) -> Iterator[tuple[Any, Any]]:
        """Each image's result and the image itself, (result, PIL RGB), as they come.

        Args:
            weights: a `models.load.Weights`.
            sources: files or PIL images, as `data.image.find_images` gives them.
            options: of the task's `predict`.

        Raises:
            UserError: an image cannot be read.
        """
        return self.part("predict").predict(weights, sources, **options)

    def predict_exported(self, network: Any, sources: Sequence[Any], **options: Any) -> Iterator[tuple[Any, Any]]:
        """The same with an `exporting.onnx_predict.ExportedNetwork`. Nothing here imports torch."""
        return self.part("predict_onnx").predict(network, sources, **options)

    def line(self, result: Any) -> str:
        """A result as `sgformer predict` prints it, without the image's name."""
        return self.part("show").line(result)

    def to_json(self, results: Iterable[Any], metadata: Mapping[str, Any]) -> Any:
        """Results as `sgformer predict --json` writes them."""
        return self.part("show").to_json(results, metadata)

    def draw(self, result: Any, image: Any, out: Path, number: int, stem: str, metadata: Mapping[str, Any]) -> None:
        """Write a result as a picture into a folder.

        Args:
            result: what was predicted.
            image: PIL RGB.
            out: the folder.
            number: of the image, from 0.
            stem: a name of its own for the picture.
            metadata: of the weights.
        """
        self.part("show").draw(result, image, out, number, stem, metadata)

    # -- looking inside, taking elsewhere -----------------------------------------------------------------------------

    def explainer(self, model: Any, metadata: Mapping[str, Any]) -> Any:
        """An `explaining.base.Explainer` of a network.

        Raises:
            UserError: it is another network than SG-Former.
        """
        return self.part("explain").explainer(model, metadata)

    def summary(self, explanation: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        """What an explained network found, for the page: `class`, `share`, and where it is drawn `colour` and `box`."""
        return self.part("explain").summary(explanation, names)

    def nothing(self, score: float) -> str:
        """What the page says where `summary` is empty."""
        return "This network names no classes."

    def graph(self, weights: Any, whole: bool, features: bool, significance: bool) -> Any:
        """What is exported, as an `exporting.graphs.Graph`.

        Args:
            weights: a `models.load.Weights`.
            whole: everything, where the format can hold it, and not the backbone's part alone.
            features, significance: also give the feature maps, the significance maps.

        Raises:
            UserError: the network does not have what is asked for.
        """
        return self.part("export").graph(self.network(weights), weights.metadata, whole, features, significance)

    def prepare_exported(self, network: Any, image: Any) -> Any:
        """A PIL image as an `ExportedNetwork` takes it: (1, 3, H, W) float32 array."""
        return self.part("predict_onnx").prepare(network, image)

    def measured(self, model: Any) -> Any:
        """The part of a network whose multiply-accumulates are counted on one image."""
        return model
