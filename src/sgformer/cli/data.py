"""`sgformer data check`, `from`, `shards`, `index` and `scenes`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from sgformer.core.terminal import say


def data_check(dir: str, json: bool = False, workers: int = 0, images: str | None = None) -> int:
    """Check a data set before training on it: classes, sizes, image formats and every unreadable file.

    Args:
        dir: image folder, COCO, label maps, shards, or what `data from` converts
        json: print JSON instead of text.
        workers: processes that read images; 0 reads in this one.
        images: folder of the images, if annotation files name another.

    Returns:
        0 if the report lists no problem, 1 otherwise, also for files that have to be converted first.
    """
    from sgformer.data.checks import check_data

    report = check_data(dir, workers, images)
    say(*(report.to_json() if json else report.to_text()).split("\n"))
    return 1 if report.problems else 0


def data_from(
    source: str,
    out: str,
    layout: Literal["coco", "ade20k", "imagenet"] | None = None,
    format: str | None = None,
    images: str | None = None,
    table: str | None = None,
    bad_images: Literal["stop", "skip"] = "stop",
) -> int:
    """Write a data set of another tool in a layout that training reads.

    Reads COCO, PASCAL VOC XML, YOLO labels, labelme JSON, VIA, colour-coded masks, CSV lists and Open Images CSV.

    Args:
        source: file or folder.
        out: folder to create.
        layout: coco (detection), ade20k (segmentation) or imagenet (classification).
        format: coco, voc, yolo, labelme, via, colours, csv, openimages or predictions; default: what it looks like.
        images: folder of the images, if they are not below SOURCE.
        table: file of class names or colours, if it is not below SOURCE.
        bad_images: on a missing or unreadable image: stop, or skip and count.

    Returns:
        0.
    """
    from sgformer.core.errors import UserError
    from sgformer.data.converting import convert

    if layout is None:
        raise UserError("--layout is missing: coco (detection), ade20k (segmentation) or imagenet (classification)")
    counts, found = convert(source, out, layout, format, images, table, bad_images)
    parts = " and ".join(f"{count} images of {split}" for split, count in counts.items())
    say(f"{out}: {parts}, {len(found.classes)} classes, in the {layout} layout")
    for note, count in found.notes.items():
        say(f"  {count} {note}")
    _tell_unsplit(counts)
    return 0


def _tell_unsplit(splits: Collection[str]) -> None:
    if "val" not in splits:
        say("  no validation images: train with --val-split .2")


def data_shards(source: str, out: str, shard_size: int = 512) -> int:
    """Pack an image folder into WebDataset tar shards, which train, eval and data check read.

    Args:
        source: data set with train/CLASS/* and val/CLASS/*, or CLASS/*.
        out: folder to create.
        shard_size: maximum size of a shard in MB.

    Returns:
        0.
    """
    from sgformer.data.sharding import make_shards
    from sgformer.data.shards import Index

    folder = make_shards(source, out, shard_size)
    found = Index.read(folder).splits
    for split, shards in found.items():
        size = sum(shard.bytes for shard, _ in shards)
        images = sum(len(columns["names"]) for _, columns in shards)
        say(f"{folder}: {images} images in {len(shards)} shards of {split}, {size / 1e6:.1f} MB")
    _tell_unsplit(found)
    return 0


def data_index(dir: str) -> int:
    """Scan WebDataset shards made elsewhere and write the index that training on them needs.

    Args:
        dir: folder or URL with train/*.tar, val/*.tar, and classes.txt for class names.

    Returns:
        0.
    """
    from sgformer.data.sharding import INDEX, index_shards

    found = index_shards(dir)
    counts = " and ".join(f"{count} of {split}" for split, count in found["samples"].items())
    say(f"{dir}/{INDEX}: {counts} images in {found['classes']} classes")
    if extra := found["extra"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(extra.items())[:8])
        say(f"members that are neither an image nor its class, left out: {sum(extra.values())} ({kinds})")
    _tell_unsplit(found["samples"])
    return 0


def data_scenes(
    out: str,
    train: int = 4000,
    val: int = 1000,
    image_size: int = 96,
    seed: int = 0,
    layout: Literal["imagenet", "coco", "ade20k"] = "imagenet",
    sprites: str | None = None,
    workers: int = 0,
) -> int:
    """Compose a data set of handwritten digits on photographs, deterministically and offline.

    Args:
        out: folder to create.
        train: number of training scenes.
        val: number of validation scenes.
        image_size: side of the images in pixels.
        seed: random seed; the same seed gives the same files.
        layout: imagenet (a digit per image), coco (boxes, masks, keypoints) or ade20k (label maps).
        sprites: fashion-mnist:DIR uses the IDX files in DIR instead of digits.
        workers: processes; 0 composes in this one.

    Returns:
        0.
    """
    from sgformer.data.scenes import make_scenes

    folder = make_scenes(out, train, val, image_size, seed, layout, sprites, workers)
    say(f"{folder}: {train} training and {val} validation scenes of {image_size} pixels in the {layout} layout")
    return 0
