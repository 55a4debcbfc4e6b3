"""The images of a run for keypoints: COCO annotations whose categories name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgformer.core.errors import UserError, require
from sgformer.core.names import quoted
from sgformer.data.coco import CocoListing, ground_truth
from sgformer.data.detection_transforms import train_transform
from sgformer.data.formats import find_format
from sgformer.data.keypoints import PERSON, SIGMA, Skeleton, mirror_order, require_same
from sgformer.models.load import Weights
from sgformer.tasks.detect.data import draw_batch, make_splits, objects, read_objects, require_truth
from sgformer.tasks.detect.metrics import CocoMetric
from sgformer.tasks.keypoints.config import KeypointsConfig
from sgformer.training.task import Splits

__all__ = ["draw_batch", "objects", "open_data", "read_listings"]  # the functions that `Task` calls

#: How listings are read.
READING = {"masks": False, "keypoints": True}


def read_listings(config: KeypointsConfig, weights: Weights | None) -> tuple[CocoListing, CocoListing]:
    """See `Task.listings`."""
    for data in filter(None, (config.data, config.val_data)):
        require_coco(data)
    train, val = read_objects(config, **READING)
    assert train.skeleton is not None
    require_same(val.skeleton, train.skeleton, val.json)
    for listing in (train, val):
        require_labelled(listing)
    return train, val


def open_data(
    config: KeypointsConfig,
    weights: Weights | None,
    batch: int,
    rank: int,
    world: int,
    listings: tuple[CocoListing, CocoListing] | None = None,
) -> Splits:
    """See `Task.splits`."""
    listings = listings or read_listings(config, weights)
    skeleton = listings[0].skeleton
    assert skeleton is not None
    hflip, order, note = flips(config, skeleton)
    about = {**skeleton.to_metadata(), "sigmas": sigmas_of(config, skeleton)}
    augment = train_transform(config.image_size, config.multi_scale, hflip, order)
    splits = make_splits("keypoints", config, weights, listings, augment, batch, rank, world, **about)
    splits.notes = [*splits.notes, *([note] if note else [])]
    return splits


def require_coco(data: Any) -> None:
    """Raise UserError if a data set is in a registered format that tells no keypoints."""
    found = find_format("objects", data)
    if found is not None and found.name != "coco":
        raise UserError(f"{data}: its format, {found.name}, has no keypoints; COCO annotations have")


def require_labelled(listing: CocoListing) -> None:
    """Raise UserError if there is no keypoint to train on, or to measure results against."""
    require_truth(listing)
    if not any(listing.keypoints_of(i).any() for i in range(len(listing))):
        raise UserError(f"{listing.json}: no object has a labelled keypoint; sgformer train detect finds boxes alone")


def flips(config: KeypointsConfig, skeleton: Skeleton) -> tuple[float, list[int], str]:
    """The probability of a horizontal flip, the order of the keypoints after it, and a line for the log.

    Raises:
        UserError: flips were asked for, but not all keypoints that have a side have a twin; a pair names no keypoint.
    """
    order, alone, sided = mirror_order(skeleton.names, config.flip_pairs)
    what = (
        f"keypoints have a side and no twin on the other: {quoted(alone)}" if alone else "no keypoint's name has a side"
    )
    if config.hflip and alone:
        raise UserError(f"--hflip {config.hflip:g}: {what}; name the pairs with --flip-pairs, or pass --hflip 0")
    if config.hflip is not None:
        return config.hflip, order, ""
    if alone or not sided:
        return 0.0, order, f"no horizontal flips, as {what}; --flip-pairs names those that change places in a mirror"
    return 0.5, order, ""


def sigmas_of(config: KeypointsConfig, skeleton: Skeleton) -> list[float]:
    """What OKS, the similarity of keypoints, is measured with: as given, or COCO's for its persons, or `SIGMA` for all.

    Raises:
        UserError: there are not as many as keypoints.
    """
    count = len(skeleton.names)
    if config.sigmas is None and skeleton.names == PERSON:
        return require("pycocotools.cocoeval", "detect").Params("keypoints").kpt_oks_sigmas.tolist()
    if not isinstance(config.sigmas, tuple):
        return [SIGMA if config.sigmas is None else float(config.sigmas)] * count
    if len(config.sigmas) != count:
        raise UserError(
            f"--sigmas: {len(config.sigmas)} of them for {count} keypoints; give one for each, or one for all"
        )
    return list(config.sigmas)


def keypoint_metric(listing: CocoListing, sigmas: Sequence[float]) -> CocoMetric:
    """The metric for results of a listing, against its own file."""
    return CocoMetric(ground_truth(listing), listing.classes, listing.own_ids, masks=False, sigmas=sigmas)
