"""One entry point for every task: train, evaluate, predict, embed, explain, export, load.

run = sgformer.train("classify", data="photos", model="sgformer_t", epochs=50)
result = sgformer.evaluate(run.path, data="photos")
predictions = sgformer.predict(run.path, ["cat.jpg"])

`weights` is a run folder, a .safetensors file of any task, a released checkpoint, a checkpoint of timm's `train.py`, or
a plain state dict together with `model`, its network's name. The command line calls the same functions. Torch is
imported only when needed: exported files work without it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgformer.core.errors import UserError, require
from sgformer.core.names import dashed
from sgformer.tasks.registry import get_task, refuse_foreign, task_of

if TYPE_CHECKING:
    from torch import nn

    from sgformer.data.image import Images
    from sgformer.explaining.base import Explainer, Picture
    from sgformer.exporting.export import Export
    from sgformer.models.load import Weights
    from sgformer.results import Embeddings, Explanation
    from sgformer.training.config import RunConfig
    from sgformer.training.run_folder import RunFolder
    from sgformer.training.task import Task

Source = str | os.PathLike[str]

# -- training ---------------------------------------------------------------------------------------------------------


def train(task: str, config: RunConfig | None = None, *, resume: Source | None = None, **options: Any) -> RunFolder:
    """Train a network on your images, validate it, and leave a run folder.

    Args:
        task: "classify" (`data/train/CLASS/*`, `data/val/CLASS/*`, or tar shards), "detect" or "keypoints" (COCO
            annotations), or "segment" (`data/images/training`, `data/annotations/training` ...).
        config: all settings; or give them as keywords, named as on the command line with underscores.
        resume: folder of a run to resume at the exact step it reached, with its own settings; `options` may only
            change `epochs`, `max_steps`, `patience`, `workers`, `device`, `devices`, `native`, and where the same data
            are.
        options: settings of the task, e.g. `data`, `model`, `epochs`; see `sgformer train TASK --help-all`.

    Returns:
        The run's folder; `.path`, absolute, holds config.yaml, metrics.csv, report.md, best.safetensors and so on.

    Raises:
        UserError: a setting, the data or the machine is invalid; the message says which.
        Interrupted: SIGINT or SIGTERM stopped training; the checkpoint is written.
    """
    trained = get_task(task)
    for package in ("lightning", "torchmetrics", "matplotlib"):
        require(package, extra="train")
    trained.require()
    from sgformer.training.config import make_config
    from sgformer.training.fit import run_training
    from sgformer.training.run_folder import resumed_config, shown_log
    from sgformer.training.trainer import quiet

    if resume is not None:
        config = resumed_config(trained.Config, resume, dataclasses.asdict(config) if config else options)
    elif config is None:
        config = make_config(trained.Config, options)
    elif options:
        config = dataclasses.replace(config, **options)
    with quiet(), shown_log():
        run = run_training(config, trained, resume)
    run.path = run.path.absolute()
    return run


# -- trained weights --------------------------------------------------------------------------------------------------


def load_model(weights: Source, model: str | None = None, **options: Any) -> nn.Module:
    """The network of any weights, in evaluation mode and in the stored dtype; `.metadata` is the file's.

    Args:
        weights: see the module.
        model: the network's name, for a plain state dict.
        options: of a classifier or backbone. For SG-Former, fields of :class:`SGFormerConfig` to change
            (``num_classes`` other than the stored one gives a fresh classifier, ``img_size`` resizes the position
            table); for other models of timm, arguments of ``timm.create_model``.

    Returns:
        An :class:`SGFormer` or another network of timm; of the other tasks, the backbone with its heads.

    Raises:
        UserError: the weights are unreadable, damaged or of an unknown network, or their tensors do not fit.
    """
    from sgformer.models.load import build_network, read_weights

    stored = read_weights(weights, model)
    if stored.architecture is None:
        return build_network(stored, options.pop("num_classes", None), **options)
    if options:
        raise UserError(f"{weights}: a network for {stored.task} takes no options, got {', '.join(options)}")
    return task_of(stored.task, weights).network(stored)


def _read(
    weights: Source, model: str | None, tokens: float | None = None, image_size: Any = None
) -> tuple[Weights, Task]:
    """The content of any weights, in float32, with a token budget if one is given, and their task. Without
    `image_size` their own is used, which must not be out of proportion."""
    from sgformer.models.load import read_weights, refuse_large

    stored = read_weights(weights, model)
    if image_size is None:
        refuse_large(stored)
    stored = stored.in_full()
    if tokens is not None:
        stored = dataclasses.replace(stored, token_budget=tokens)
    return stored, task_of(stored.task, weights)


#: Options of `evaluate` by features, which divide data without validation images.
SPLITTING = ("val_split", "split_seed")


def evaluate(
    weights: Source,
    data: Source,
    *,
    model: str | None = None,
    tokens: float | None = None,
    knn: bool = False,
    linear_probe: bool = False,
    **options: Any,
) -> Any:
    """Evaluate trained weights on a split of a data set, counting every image once.

    Args:
        weights: see the module.
        data: the data set, in the layout of the training.
        model: the network's name, for a plain state dict.
        tokens: key/value tokens as a multiple of those the network was trained with, .25 to 4; see
            :func:`sgformer.set_token_budget`.
        knn, linear_probe: score simple classifiers of the features instead, for weights of any task on a data set of
            classification; see `tasks.features.score_features`.
        options: `split`, `batch_size`, `image_size`, `workers`, `device`, `devices`, `precision`, `bad_images`, `out`
            (a folder for pictures), and the task's own: `crop_pct`; `multi_scale`, `flip`, `sliding`; `images`. With
            `knn` and `linear_probe` also `val_split` and `split_seed`, as in training.

    Returns:
        The task's evaluation, e.g. with `.top1`, `.miou` or `.box["AP"]`, or `FeatureScores` with `.knn` and
        `.linear_probe`; `.write(folder)` writes its files.

    Raises:
        UserError: weights or data are invalid, or do not match.
    """
    for package in ("lightning", "torchmetrics"):
        require(package, extra="train")
    stored, task = _read(weights, model, tokens, options.get("image_size"))
    if knn or linear_probe:
        return _score_features(stored, data, knn, linear_probe, **options)
    for name in SPLITTING:
        if name in options:
            raise UserError(f"--{dashed(name)} is for --knn and --linear-probe; --split all evaluates on all images")
    task.require()
    task.check(stored)
    refuse_foreign(options, task, "eval_options", weights)
    return task.evaluate(stored, data, **options)


def _score_features(
    weights: Weights,
    data: Source,
    knn: bool,
    linear_probe: bool,
    *,
    out: Any = None,
    devices: Any = "auto",
    precision: str = "fp32",
    **options: Any,
) -> Any:
    """`evaluate` by simple classifiers of the features; on one device, in fp32."""
    from sgformer.tasks.features import score_features

    asked = "--knn" if knn else "--linear-probe"
    if devices not in ("auto", 1) or precision != "fp32":
        raise UserError(f"{asked} runs on one device in fp32; leave out --devices and --precision")
    for name in options:
        if name not in ("split", "batch_size", "image_size", "crop_pct", "bad_images", "workers", "device", *SPLITTING):
            raise UserError(f"--{dashed(name)} does not go together with {asked}")
    return score_features(weights, data, knn=knn, linear_probe=linear_probe, **options)


def predict(
    weights: Source,
    images: Any,
    *,
    model: str | None = None,
    tokens: float | None = None,
    bad_images: str = "stop",
    stream: bool = False,
    **options: Any,
) -> list[Any] | Iterator[Any]:
    """Run a network on images.

    Args:
        weights: see the module; also an `.onnx` file of `sgformer export`, which needs no torch.
        images: one or several files, folders (searched for images, also nested), or images in memory, which are read
            as their files are: PIL images, bytes, arrays (H, W, C), tensors (C, H, W); see `data.image.open_image`.
        model: the network's name, for a plain state dict.
        tokens: key/value tokens as a multiple of those the network was trained with, .25 to 4; see
            :func:`sgformer.set_token_budget`.
        bad_images: "stop" at an image that cannot be read, or "skip" it with a warning: then there are fewer results
            than images, each with the name of its own.
        stream: return an iterator that yields results one by one, for more images than fit in memory.
        options: `image_size`, `device`, and the task's own: `top`, `batch_size`, `precision`; `multi_scale`, `flip`,
            `sliding`; `score`.

    Returns:
        For each image a `Prediction` (`.labels`), `Segments` (`.labels`, `.shares()`) or `Detections` (`.results`).

    Raises:
        UserError: weights or an image cannot be read, or an option is invalid.
    """
    from sgformer.data.image import Images

    _, pairs, _ = predict_images(weights, Images(images, bad_images), model=model, tokens=tokens, **options)
    results = (result for result, _ in pairs)
    return results if stream else list(results)


def predict_images(
    weights: Source, images: Images, *, model: str | None = None, tokens: float | None = None, **options: Any
) -> tuple[Any, Iterator[tuple[Any, Any]], dict[str, Any]]:
    """:func:`predict` for callers that also show the images.

    Returns:
        The task, an iterator over (result, PIL RGB image), and the metadata of the weights.
    """
    if is_exported(weights):
        from sgformer.exporting.onnx_predict import ExportedNetwork

        device = options.pop("device", "auto")
        if device not in ("auto", "cpu"):
            raise UserError(f"--device {device}: exported files run on the CPU here")
        network = ExportedNetwork(weights)
        task = task_of(network.metadata["task"], weights)
        refuse_foreign(options, task, "predict_options", weights)
        for name in ("multi_scale", "flip", "sliding"):
            if options.get(name):
                raise UserError(f"--{dashed(name)} is for weights; {weights} is an exported file")
        if tokens is not None:
            raise UserError(f"--tokens is for weights; {weights} keeps those it was exported with")
        if options.pop("precision", "fp32") != "fp32":
            raise UserError(f"--precision is for weights; {weights} keeps that which it was exported with")
        return task, task.predict_exported(network, images, **options), network.metadata
    stored, task = _read(weights, model, tokens, options.get("image_size"))
    task.require()
    task.check(stored)
    refuse_foreign(options, task, "predict_options", weights)
    return task, task.predict(stored, images, **options), dict(stored.metadata)


def embed(
    weights: Source,
    images: Any,
    *,
    model: str | None = None,
    tokens: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 32,
    bad_images: str = "stop",
    device: str = "auto",
) -> Embeddings:
    """The features that a network sees in images: the input of its classifier or, of detection and segmentation, the
    mean of the backbone's last map.

    Args:
        weights: see the module; of any task.
        images: as for `predict`.
        model: the network's name, for a plain state dict.
        tokens: key/value tokens as a multiple of those the network was trained with, .25 to 4; see
            :func:`sgformer.set_token_budget`.
        image_size: pixels, or (height, width); by default as trained or, of detection and segmentation, 224.
        batch_size: images per batch.
        bad_images: "stop" at an image that cannot be read, or "skip" it with a warning.
        device: "auto", "cpu", "cuda" ...

    Returns:
        `.images`, the names, and `.features`, (N, C) float32; `.write(file)` writes both.

    Raises:
        UserError: weights or an image cannot be read, or an option is invalid.
    """
    from sgformer.data.image import Images

    options = {"model": model, "tokens": tokens, "image_size": image_size, "batch_size": batch_size, "device": device}
    return embed_images(weights, Images(images, bad_images), **options)  # type: ignore[arg-type]


def embed_images(
    weights: Source, images: Images, *, model: str | None = None, tokens: float | None = None, **options: Any
) -> Embeddings:
    """:func:`embed` for callers that are told which images are left out."""
    if is_exported(weights):
        raise UserError(f"{weights}: an exported file has no embeddings; take them from the weights it was made from")
    from sgformer.tasks.features import embed

    stored, task = _read(weights, model, tokens, options.get("image_size"))
    if stored.architecture is not None:
        task.require()
    return embed(stored, images, **options)


def is_exported(weights: Source) -> bool:
    """Whether `weights` is an exported file that `predict` can run."""
    return Path(weights).suffix == ".onnx"


# -- explaining and exporting -----------------------------------------------------------------------------------------


def explainer_for(model: nn.Module) -> Explainer:
    """An explainer of a network in memory.

    Args:
        model: an :class:`SGFormer`, or a network of :func:`load_model`.

    Raises:
        UserError: the network is not an SG-Former and has no significance.
    """
    about = dict(getattr(model, "metadata", None) or {})
    task = getattr(type(model), "task", None) or about.get("task", "classify")
    return get_task(task).explainer(model, about)


def load_explainer(
    weights: Source,
    device: str = "auto",
    model: str | None = None,
    tokens: float | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Explainer:
    """An explainer of trained weights.

    Args:
        weights: see the module.
        device: "auto", "cpu", "cuda" ...
        model: the network's name, for a plain state dict.
        tokens: key/value tokens as a multiple of those the network was trained with, .25 to 4; see
            :func:`sgformer.set_token_budget`.
        image_size: pixels, as in `explain`; by default as trained.

    Raises:
        UserError: the weights are unreadable or not of an SG-Former, or the size is invalid.
    """
    from sgformer.core.device import find_device

    where = find_device(device)
    stored, task = _read(weights, model, tokens, image_size)
    about = dict(stored.metadata)
    if stored.architecture is None:
        about.setdefault("image_size", 224)
    try:
        explainer = task.explainer(task.network(stored).to(where), about)
    except UserError as error:
        raise UserError(f"{weights}: holds {error}") from None
    if image_size is not None:
        explainer.take_size(image_size)
    return explainer


def explain(
    weights: Source | nn.Module,
    images: Picture | Sequence[Picture],
    *,
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    bad_images: str = "stop",
    device: str = "auto",
    model: str | None = None,
    tokens: float | None = None,
) -> Iterator[Explanation]:
    """Show what a network attended to on images, one by one.

    Args:
        weights: of any task, see the module; or a network in memory, whose mode is kept.
        images: as for `predict`, except that tensors of floats (3, H, W) are taken as the network takes them
            (normalised; for a detector in 0..1).
        image_size: pixels, as in validation (classification: height and width; segmentation: the short side; detection:
            short side, or short and longest); by default as trained or, if unknown, the image's own.
        limit: maximum number of images, spread evenly over those given.
        bad_images: "stop" at an image that cannot be read, or "skip" it with a warning.
        device: "auto", "cpu", "cuda" ...; a network in memory stays where it is.
        model: the network's name, for a plain state dict.
        tokens: key/value tokens as a multiple of those the network was trained with, .25 to 4; see
            :func:`sgformer.set_token_budget`. For weights; a network in memory keeps its own.

    Raises:
        UserError: weights or an image cannot be read, or the network is not an SG-Former.
    """
    from sgformer.data.image import Images
    from sgformer.explaining.base import open_picture

    return explain_images(
        weights, Images(images, bad_images, open=open_picture).limited(limit), image_size, device, model, tokens
    )


def explain_images(
    weights: Source | nn.Module,
    images: Images,
    image_size: int | tuple[int, int] | None = None,
    device: str = "auto",
    model: str | None = None,
    tokens: float | None = None,
) -> Iterator[Explanation]:
    """:func:`explain` for callers that are told which images are left out."""
    if isinstance(weights, str | os.PathLike):
        return load_explainer(weights, device, model, tokens, image_size).explain_all(images)
    explainer = explainer_for(weights)
    if image_size is not None:
        explainer.take_size(image_size)
    return explainer.explain_all(images)


def export(
    weights: Source,
    out: Source,
    *,
    format: str = "onnx",
    image_size: int | tuple[int, int] | None = None,
    features: bool = False,
    significance: bool = False,
    precision: str = "fp32",
    calibration: Source | None = None,
    model: str | None = None,
    tokens: float | None = None,
) -> Export:
    """Export a network to another runtime, run the file there, and compare it with PyTorch.

    Batch, height and width are open where network and format allow it. No file is left if the comparison fails.

    Args:
        weights: see the module.
        out: the file; its ending is the format's (.onnx, .pt2, .xml). For "hub" a new folder.
        format: "onnx", "torch-export", "openvino", "hub" (classifiers, for the Hugging Face Hub), or one of your own
            (:func:`register_export`).
        image_size: fixed input size: pixels or (height, width), multiples of 32. A whole detector always has a fixed
            size, by default the square of the side it was trained with.
        features: also output the four feature maps.
        significance: also output the significance map of every hybrid-scale block.
        precision: "fp32"; "fp16" or "int8" (both ONNX only).
        calibration: a folder of images that static int8 is calibrated on, and the change in the results measured on.
        model: the network's name, for a plain state dict.
        tokens: key/value tokens as a multiple of those the network was trained with, .25 to 4; see
            :func:`sgformer.set_token_budget`;
            the file keeps them.

    Raises:
        UserError: the weights cannot be read or exported; the file differs from PyTorch by more than 1e-4 of
            the largest output; a package is missing.
    """
    from sgformer.exporting.formats import FORMATS

    FORMATS.check(format, "--format")
    from sgformer.exporting.export import export_graph

    stored, task = _read(weights, model, tokens, image_size)
    task.check(stored)
    return export_graph(
        lambda whole: task.graph(stored, whole, features, significance),
        out,
        format=format,
        image_size=image_size,
        precision=precision,
        calibration=calibration,
        prepare=task.prepare_exported,
    )
