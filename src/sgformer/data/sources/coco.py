"""COCO annotations, also those of `sgformer predict --json`; read by `data.coco`, with its checks and notes."""

from __future__ import annotations

from pathlib import Path

from sgformer.data.coco import CocoListing, find_coco, is_coco, read_coco, single_coco
from sgformer.data.sources.base import Found, Picture, Reading, Thing, head


def detects(root: Path) -> bool:
    """Whether it is a folder with COCO's files, or a JSON file with its words at the beginning."""
    if root.is_file():
        return root.suffix.lower() == ".json" and any(
            f'"{w}"' in head(root, 2**16) for w in ("annotations", "categories")
        )
    return is_coco(root)


def read(reading: Reading) -> Found:
    """See the package."""
    single = single_coco(reading.root)
    images = reading.places[0] if reading.places[0] != reading.folder else None
    pictures: list[Picture] = []
    train: CocoListing | None = None
    for split in ("",) if single else ("train", "val"):
        file, folders = find_coco(single or reading.root, split, images)
        known = train.categories if train else None
        listing = read_coco(file, folders, categories=known, check_files=not reading.skip)
        train = train or listing
        reading.notes.update(listing.notes)
        for i, image in enumerate(listing.images):
            path = listing.path(i)
            if reading.size(path) is None:
                continue
            things = [
                Thing(listing.classes[label], (x1, y1, x2, y2), mask)
                for label, (x1, y1, x2, y2), mask in listing.objects_of(i)
            ]
            pictures.append(Picture(path, split, (image.width, image.height), things))
    assert train is not None
    return Found(pictures, train.classes)
