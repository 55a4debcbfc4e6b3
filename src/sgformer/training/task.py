"""The interface of a vision task, for training and for all later uses of its weights.

A task is a subclass of :class:`Task` in a folder of its own under `tasks/`. Training, command line, exports, the page
and ablations depend on this class alone. Its methods import lazily: the command line's help needs names and options
only, and exported networks run without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from sgformer.core.errors import UserError, first_line, require
from sgformer.models.metadata import require as require_entries
from sgformer.training.config import RunConfig


class Evaluation(Protocol):
    """The metrics of an evaluation."""

    skipped: tuple[str, ...]

    def write(self, folder: Any, picture: bool = True) -> None:
        """Write the metrics to a folder, with pictures if `picture`."""

    def headline(self) -> str:
        """The result in one line."""
        ...

    def table(self) -> str:
        """All metrics, for a terminal."""
        ...

    def counted(self) -> str:
        """The size of the split: `341 images of 10 classes`."""
        ...


@dataclass
class Splits:
    """The data of a run.

    Attributes:
        train, val: data sets of samples, indexed by (epoch, index).
        train_sampler: an `EpochSampler`; a validation follows each of its passes.
        val_sampler: an `EpochSampler` that yields every sample once.
        total_steps: updates of the full schedule.
        steps_per_pass: updates per pass over the training images.
        collate: a list of samples -> a batch (images, targets, indices, skipped).
        val_collate: the same for validation.
        metadata: stored with the weights: `task`, `model`, `classes`, and the settings that evaluation needs.
        about: a one-line description for the log and the report.
        size: the image size, for the log.
        notes: what the user has to know of the data, one line each, for the log: files left out, absent classes.
        split: what `split.json` holds, where --val-split divided the data.
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
    notes: Sequence[str] = ()
    split: Mapping[str, Any] | None = None


class Task:
    """A task: its texts, its options, and its part in training, evaluation, prediction, explanation and export.

    A subclass in `tasks/NAME/__init__.py` defines the texts. The files beside it define functions with fixed names,
    which the methods here call:

        config.py        Config
        data.py          open_data, and optionally read_listings, draw_batch, and objects (the objects of a sample)
        module.py        build
        metrics.py       read, and optionally report
        predict.py       network, predict, evaluate, and optionally finish (pictures at the end of a run)
        predict_onnx.py  predict, prepare
        show.py          line, to_json, draw
        explain.py       explainer, summary
        export.py        graph

    The first five and show.py make a task that is trained, measured and predicted with; `tests/tasks/toy` is the
    smallest. The others bring what their names say.

    Attributes:
        name: on the command line and in weights, e.g. "classify".
        title: the name in running text, e.g. "classification".
        about: a short description of `sgformer train NAME`.
        description: the same in a sentence that names the data layout.
        example: options of a typical training.
        data_help: the help of `sgformer eval --data`.
        eval_options, predict_options: task-specific options of `eval` and `predict`, with underscores.
        score: the column of `metrics.csv` that ablations compare.
        unit: the unit of progress in a run's log, "epoch" or "step".
        pictures: (title, file in the run's folder) for the report.
        written: the contents of `eval`'s output folder, for the last line on the terminal.
        quantity: the meaning of the shares in `summary`.
        extras: (package, extra of this package that installs it) needed in addition to those of training.
        needs: the entries of weights' metadata that evaluation, prediction and export read.
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
    needs: ClassVar[tuple[str, ...]] = ()

    def part(self, name: str) -> Any:
        """Import a module of the task's folder."""
        return importlib.import_module(f"{type(self).__module__}.{name}")

    def require(self) -> None:
        """Raise UserError if a package in `extras` is missing."""
        for package, extra in self.extras:
            require(package, extra=extra)

    def check(self, weights: Any) -> None:
        """Raise UserError if the metadata of a `models.load.Weights` lack what the task `needs`."""
        require_entries(weights.metadata, self.needs, weights.path)

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def Config(self) -> type[RunConfig]:
        """The settings of a run: the source of options, help and `config.yaml`."""
        return self.part("config").Config

    def listings(self, config: Any, weights: Any) -> tuple[Any, Any] | None:
        """The training and validation listings of a run, which its `auto` settings follow from.

        None for a task that does not list its data beforehand: its `auto` settings have their standard values.

        Args:
            config: all settings, `auto` ones included.
            weights: the initial `models.load.Weights`, or None.

        Raises:
            UserError: as `splits`.
        """
        read = getattr(self.part("data"), "read_listings", None)
        return read(config, weights) if read else None

    def splits(
        self, config: Any, weights: Any, batch: int, rank: int, world: int, listings: tuple[Any, Any] | None = None
    ) -> Splits:
        """Open the data of a run.

        Args:
            config: all settings.
            weights: the initial `models.load.Weights`, or None.
            batch: images per forward pass on one process.
            rank, world: this process's index, and the number of processes.
            listings: from `listings`, if they have been read.

        Raises:
            UserError: the data is missing or invalid; names the file or folder.
        """
        read = {} if listings is None else {"listings": listings}
        return self.part("data").open_data(config, weights, batch, rank, world, **read)

    def module(self, config: Any, splits: Splits, weights: Any) -> Any:
        """The network to train, as a `TaskModule`; freshly initialised, or from `weights`.

        Raises:
            UserError: the network does not exist, or the weights do not fit it.
        """
        return self.part("module").build(config, splits, weights)

    def draw_batch(self, config: Any, splits: Splits, images: list[Any], targets: list[Any], out: Path) -> None:
        """Draw the first augmented training samples as a PNG, where the task has a picture of them."""
        if draw := getattr(self.part("data"), "draw_batch", None):
            draw(config, splits, images, targets, out)

    def objects(self, splits: Splits, index: int) -> Any:
        """The objects' pixels (H, W) bool of a validation sample, or None if unknown."""
        known = getattr(self.part("data"), "objects", None)
        return known(splits, index) if known else None

    def read_evaluation(self, folder: Path) -> Any:
        """Read an evaluation back from the folder that `Evaluation.write` filled.

        Raises:
            UserError: a file in it is missing or damaged.
        """
        try:
            result = self.part("metrics").read(folder)
            # Numbers of other kinds in a file that is whole show themselves where they are used.
            result.headline(), self.report("", result, {}, [])
            return result
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, OverflowError) as error:
            raise UserError(f"{folder}: damaged ({first_line(error)}); sgformer eval measures again") from None

    def report(self, model: str, result: Any, facts: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
        """Markdown of a finished run: the task's own, or the numbers, the facts and the pictures."""
        if own := getattr(self.part("metrics"), "report", None):
            return own(model, result, facts, pictures)
        from sgformer.training.report import facts_table, show

        lines = [f"# {model}: {result.headline()}", "", result.table(), "", result.counted(), "", *facts_table(facts)]
        return "\n".join([*lines, *show(pictures)])

    def scores(self, module: Any) -> tuple[str, ...]:
        """The columns of `metrics.csv` in the curves; the first one is the main score."""
        return (self.score,)

    def finish(self, folder: Path, splits: Splits, module: Any) -> None:
        """Add files to the best validation's folder at the end of a run, on the main process."""
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
        """Evaluate weights on a split, using every image exactly once.

        Args:
            weights: a `models.load.Weights`.
            data: the data set.
            out: folder for pictures that need the images; the caller writes the metrics.
            options: of the task's `evaluate`.

        Raises:
            UserError: the weights or the data are invalid, or do not match.
        """
        return self.part("predict").evaluate(weights, data, out=out, **options)

    def predict(self, weights: Any, images: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (result, PIL RGB image) for each image, lazily.

        Args:
            weights: a `models.load.Weights`.
            images: a `data.image.Images`, which yields (name, PIL RGB image) and leaves out the unreadable ones.
            options: of the task's `predict`.

        Raises:
            UserError: an image cannot be read.
        """
        return self.part("predict").predict(weights, images, **options)

    def predict_exported(self, network: Any, images: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
        """As `predict`, with an `exporting.onnx_predict.ExportedNetwork`; does not import torch."""
        return self.part("predict_onnx").predict(network, images, **options)

    def line(self, result: Any) -> str:
        """A result as printed by `sgformer predict`, without the image's name."""
        return self.part("show").line(result)

    def to_json(self, results: Iterable[Any], metadata: Mapping[str, Any]) -> Any:
        """Results as written by `sgformer predict --json`."""
        return self.part("show").to_json(results, metadata)

    def draw(self, result: Any, image: Any, out: Path, number: int, stem: str, metadata: Mapping[str, Any]) -> None:
        """Draw a result into a folder.

        Args:
            result: the prediction.
            image: the PIL RGB image.
            out: the folder.
            number: the image's index, from 0.
            stem: a unique file name stem.
            metadata: the metadata of the weights.
        """
        self.part("show").draw(result, image, out, number, stem, metadata)

    # -- explanation and export ---------------------------------------------------------------------------------------

    def explainer(self, model: Any, metadata: Mapping[str, Any]) -> Any:
        """An `explaining.base.Explainer` for a network.

        Raises:
            UserError: the backbone is not an SG-Former.
        """
        return self.part("explain").explainer(model, metadata)

    def summary(self, explanation: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        """The prediction of an explanation, for the page: `class`, `share`, and if drawn `colour` and `box`."""
        return self.part("explain").summary(explanation, names)

    def nothing(self, score: float) -> str:
        """The page's text for an empty `summary`."""
        return "This network predicts no classes."

    def graph(self, weights: Any, whole: bool, features: bool, significance: bool) -> Any:
        """The exported graph, as an `exporting.graphs.Graph`.

        Args:
            weights: a `models.load.Weights`.
            whole: export the full network, if the format supports it, instead of the backbone alone.
            features, significance: also output the feature maps, the significance maps.

        Raises:
            UserError: the network lacks a requested output.
        """
        return self.part("export").graph(self.network(weights), weights.metadata, whole, features, significance)

    def prepare_exported(self, network: Any, image: Any) -> Any:
        """Preprocess a PIL image for an `ExportedNetwork`: (1, 3, H, W) float32 array."""
        return self.part("predict_onnx").prepare(network, image)

    def measured(self, model: Any) -> Any:
        """The part of a network whose multiply-accumulates are counted, on one image."""
        return model
