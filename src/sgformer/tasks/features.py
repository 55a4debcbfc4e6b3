"""Embeddings of images by trained weights of any task, and how well simple classifiers do on them.

k-NN is that of DINO (Caron et al., 2021); the linear probe is scikit-learn's logistic regression. Neither trains the
network.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgformer.core.device import find_device
from sgformer.core.errors import UserError, require
from sgformer.core.files import make_folder, write_json
from sgformer.data.image import Images
from sgformer.data.preparing import EvalTransform, eval_transform
from sgformer.models.backbone import SGFormer
from sgformer.models.load import Weights, build_network
from sgformer.results import Embeddings
from sgformer.tasks.classify.predict import WORTH_PREPARING, reading
from sgformer.tasks.registry import task_of

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of k-NN, as in DINO
PENALTIES = tuple(10.0**power for power in range(3, -4, -1))  # of the linear probe: the inverse of scikit-learn's C
HELD_OUT = 0.2  # of the training images, to choose the penalty on
ITERATIONS = 1000


class MeanOfLastMap(nn.Module):
    """The embeddings of a dense network's backbone, whose layers after its last map were never trained."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)[-1].mean((2, 3))


def embedder(weights: Weights, device: torch.device, images: int) -> nn.Module:
    """The network of (B, 3, H, W) -> (B, C): a classifier's input or, of dense tasks, the mean of the last feature map.

    Args:
        weights: of any task.
        device: where to run.
        images: how many it will see; for many, an SG-Former on the CPU is prepared by :func:`sgformer.optimize`.

    Raises:
        UserError: the tensors do not fit, or the network has no backbone.
    """
    network: nn.Module
    if weights.architecture is None:
        network = build_network(weights, num_classes=0)
    else:
        dense = task_of(weights.task, weights.path).network(weights)
        if not hasattr(dense, "backbone"):
            raise UserError(f"{weights.path}: a network for {weights.task} has no backbone to take embeddings from")
        network = MeanOfLastMap(dense.backbone)
    network.float().eval().to(device)
    if device.type == "cpu" and isinstance(network, SGFormer) and images >= WORTH_PREPARING:
        from sgformer.backends.optimize import optimize

        network = optimize(network)
    return network


def preparation(weights: Weights, image_size: Any = None, crop_pct: float | None = None) -> EvalTransform:
    """As in validation for a classifier. For dense tasks, whose images keep their shape, a centre crop of 224 pixels,
    with the network's own normalisation."""
    return eval_transform(**reading(weights.backbone().metadata, image_size, crop_pct))


def extract(network: nn.Module, images: Tensor, device: torch.device, path: Path) -> np.ndarray:
    """(B, 3, H, W) -> (B, C) float32.

    Raises:
        UserError: a feature is NaN or infinite; names `path`, of the weights.
    """
    with torch.inference_mode():
        features = network(images.to(device)).float().cpu().numpy()
    if not np.isfinite(features).all():
        raise UserError(f"{path}: its features are NaN or infinite; take the weights of an earlier step")
    return features


def embed(
    weights: Weights,
    images: Images,
    *,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> Embeddings:
    """The embeddings of images.

    Args:
        weights: of any task.
        images: the images; those left out have no row.
        image_size: pixels, or (height, width); by default see `preparation`.
        batch_size: images per batch.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: an image cannot be read, or a value is invalid.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be above 0, got {batch_size}")
    where, transform = find_device(device), preparation(weights, image_size)
    network = embedder(weights, where, len(images))
    names: list[str] = []
    parts = [np.zeros((0, 0), np.float32)]
    for batch in images.batches(batch_size):
        names += [name for name, _ in batch]
        pixels = torch.stack([transform(image) for _, image in batch])
        parts.append(extract(network, pixels, where, weights.path))
    return Embeddings(tuple(names), np.concatenate(parts[1:] or parts))


@dataclass(frozen=True)
class FeatureScores:
    """How well simple classifiers do on the embeddings of a data set.

    Attributes:
        knn: `top1` and `top5` (fractions), `k`, `temperature`; None if not asked for.
        linear_probe: `top1`, `top5`, the `penalty` chosen, `held_out_top1` of the training images that chose it, and
            whether the fit `converged`; None if not asked for.
        images, train_images: numbers of images scored and learned from.
        classes: number of classes.
        features: number of features, C.
        skipped: one line for each unreadable image that was left out.
    """

    knn: dict[str, Any] | None
    linear_probe: dict[str, Any] | None
    images: int
    train_images: int
    classes: int
    features: int
    skipped: tuple[str, ...] = field(default=())

    def summary(self) -> dict[str, Any]:
        """The results, as stored in JSON."""
        return {**vars(self), "skipped": list(self.skipped)}

    def table(self) -> str:
        """The results, for a terminal."""
        lines = []
        if knn := self.knn:
            lines.append(f"k-NN          {_scores(knn)}   (k {knn['k']})")
        if probe := self.linear_probe:
            unfinished = "" if probe["converged"] else ", not converged"
            lines.append(
                f"linear probe  {_scores(probe)}   (penalty {probe['penalty']:g}, chosen with "
                f"{100 * probe['held_out_top1']:.2f} % on held-out training images{unfinished})"
            )
        return "\n".join(lines)

    def headline(self) -> str:
        """The result in one line."""
        return "; ".join(" ".join(line.split()) for line in self.table().splitlines())

    def counted(self) -> str:
        """The size of the data."""
        return (
            f"{self.images} images of {self.classes} classes, by {self.features} features of {self.train_images} "
            "training images"
        )

    def write(self, folder: str | os.PathLike[str], picture: bool = True) -> None:
        """`features.json` in `folder`; there are no pictures."""
        write_json(make_folder(folder) / "features.json", self.summary())


def _scores(result: dict[str, Any]) -> str:
    return f"top-1 {100 * result['top1']:.2f} %   top-5 {100 * result['top5']:.2f} %"


def score_features(
    weights: Weights,
    data: str | os.PathLike[str],
    *,
    knn: bool,
    linear_probe: bool,
    split: str = "val",
    val_split: float | None = None,
    split_seed: int | None = None,
    batch_size: int = 64,
    image_size: int | tuple[int, int] | None = None,
    crop_pct: float | None = None,
    bad_images: str = "stop",
    workers: int = 4,
    device: str = "auto",
) -> FeatureScores:
    """Embed `data/train` and `data/split`, learn from the first, score on the second.

    Data without validation images are divided as --val-split divides them: as it did in the run of the weights, or else
    as `val_split` says.

    Args:
        weights: of any task.
        data: a data set of classification, in whatever format; its classes need not be those of the weights.
        knn, linear_probe: what to score.
        split: the images scored.
        val_split, split_seed: share of the images to score, and the seed that chooses them, of data that are not split.
        batch_size, workers: images per batch, processes that read them.
        image_size, crop_pct: by default see `preparation`.
        bad_images: "stop" at an unreadable image, or "skip" and list them.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: weights or data are invalid, or the data is too small.
    """
    if linear_probe:
        require("sklearn.linear_model", extra="demo")
    if split == "train":
        raise UserError("--split train: the training images are what the classifiers learn from; score another split")
    train, scored = _listings(weights, data, split, val_split, split_seed or 0)
    if len(train.classes) < 2:
        raise UserError(f"{data}: one class only; there is nothing to tell apart")
    where, transform = find_device(device), preparation(weights, image_size, crop_pct)
    network = embedder(weights, where, len(train) + len(scored))

    def see(images: Tensor) -> np.ndarray:
        return extract(network, images, where, weights.path)

    (x, y, bad), (x_scored, y_scored, bad_scored) = (
        embed_listing(listing, transform, see, batch_size, bad_images, workers) for listing in (train, scored)
    )
    classes = len(train.classes)
    return FeatureScores(
        score_neighbours(x, y, x_scored, y_scored, classes) if knn else None,
        score_probe(x, y, x_scored, y_scored) if linear_probe else None,
        len(x_scored),
        len(x),
        classes,
        x.shape[1],
        (*bad, *bad_scored),
    )


def _listings(weights: Weights, data: Any, split: str, val_split: float | None, split_seed: int) -> tuple[Any, Any]:
    """The images to learn from and those to score."""
    from sgformer.data import splitting
    from sgformer.data.formats import open_data

    if (kept := splitting.kept_by(weights.path, weights.metadata, data, split, "imagenet")) is not None:
        train, scored = splitting.open_classes(data, kept)
        if len(train):  # the run's own data; otherwise it has seen none of these images
            if val_split is not None and (val_split, split_seed) != (kept.fraction, kept.seed):
                raise UserError(f"{kept.source} says which of these images the weights know: leave --val-split out")
            return train, scored
    if val_split is not None:
        return splitting.open_classes(data, splitting.ValSplit(val_split, split_seed))
    train = open_data("classes", data, "train")
    return train, open_data("classes", data, split, train.classes)


def embed_listing(
    listing: Any,
    transform: EvalTransform,
    see: Callable[[Tensor], np.ndarray],
    batch_size: int,
    bad_images: str,
    workers: int,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features (N, C) float32 and classes (N,) int64 of a listing's readable images, and a line for each other one;
    `see` gives the features of a batch."""
    from sgformer.data.imagefolder import EpochSampler, ImageFolderDataset, collate
    from sgformer.training.fit import build_loader
    from sgformer.training.worker_errors import worker_errors

    if batch_size < 1 or workers < 0:
        raise UserError(f"--batch-size must be above 0 and --workers 0 or more, got {batch_size} and {workers}")
    dataset = ImageFolderDataset(listing, transform, bad_images=bad_images)
    features, classes, skipped = [], [], []
    with worker_errors():
        for batch in build_loader(dataset, EpochSampler(len(dataset), batch_size, train=False), workers, collate):
            skipped.extend(batch.skipped)
            if len(batch.target):
                features.append(see(batch.image))
                classes.append(batch.target.numpy())
    if not features:
        raise UserError(f"no image of {listing.split} could be read; the first error: {skipped[0]}")
    return np.concatenate(features), np.concatenate(classes), skipped


def score_neighbours(
    x: np.ndarray, y: np.ndarray, x_scored: np.ndarray, y_scored: np.ndarray, classes: int
) -> dict[str, Any]:
    """k-NN by cosine similarity s; each of the k nearest training images votes for its class with exp(s / temperature).

    Args:
        x, y: features (N, C) and classes (N,) of the training images.
        x_scored, y_scored: of the images to score.
        classes: number of classes.
    """
    known, images = (nn.functional.normalize(torch.from_numpy(one), dim=1) for one in (x, x_scored))
    k, labels = min(NEIGHBOURS, len(x)), torch.from_numpy(y)
    votes = []
    for part in images.split(256):  # bounds the memory for similarities
        similarity, nearest = (part @ known.T).topk(k)
        weight = ((similarity - 1) / TEMPERATURE).exp()  # minus 1: the same ranks, no overflow
        votes.append(torch.zeros(len(part), classes).scatter_add_(1, labels[nearest], weight))
    return {**_accuracy(torch.cat(votes).numpy(), y_scored), "k": k, "temperature": TEMPERATURE}


def score_probe(x: np.ndarray, y: np.ndarray, x_scored: np.ndarray, y_scored: np.ndarray) -> dict[str, Any]:
    """Logistic regression on standardised features. Its penalty is chosen on a fifth of the training images.

    Args:
        x, y: features (N, C) and classes (N,) of the training images.
        x_scored, y_scored: of the images to score.

    Raises:
        UserError: no class has two training images.
    """
    held_out = hold_out(y)
    if not held_out.any():
        raise UserError("--linear-probe: no class has two training images, one to learn from and one to choose on")

    def fit(penalty: float, rows: np.ndarray) -> Any:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=ITERATIONS))
        with warnings.catch_warnings():  # reported as `converged`
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(x[rows], y[rows])

    def score(model: Any, images: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        values = model.decision_function(images)
        values = np.column_stack([-values, values]) if values.ndim == 1 else values  # of two classes
        scores = np.full((len(images), int(y.max()) + 1), -np.inf)
        scores[:, model.classes_] = values
        return _accuracy(scores, truth)

    tried = [score(fit(penalty, ~held_out), x[held_out], y[held_out])["top1"] for penalty in PENALTIES]
    best = int(np.argmax(tried))  # of equals the first, which has the strongest penalty
    model = fit(PENALTIES[best], np.ones(len(y), bool))
    return {
        **score(model, x_scored, y_scored),
        "penalty": PENALTIES[best],
        "held_out_top1": tried[best],
        "converged": bool(model[-1].n_iter_.max() < ITERATIONS),
    }


def hold_out(y: np.ndarray) -> np.ndarray:
    """(N,) bool: a fifth of each class's images, at least one where a class has two; the same at every call."""
    order = np.random.default_rng(0).permutation(len(y))
    result = np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = order[y[order] == label]
        result[rows[: max(int(HELD_OUT * len(rows)), int(len(rows) > 1))]] = True
    return result


def _accuracy(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 as fractions; with fewer than five classes, top-5 counts all."""
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = ranked == truth[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(1).mean())}
