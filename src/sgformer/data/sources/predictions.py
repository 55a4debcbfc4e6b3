"""What `sgformer predict --json` writes for a classifier: the most probable class becomes the image's class."""

from __future__ import annotations

from pathlib import Path

from sgformer.core.errors import UserError
from sgformer.data.sources.base import Found, Picture, Reading, head, read_json


def detects(root: Path) -> bool:
    """Whether it is a JSON file that begins with an image and its labels."""
    if not root.is_file() or root.suffix.lower() != ".json":
        return False
    text = head(root)
    return text.lstrip().startswith("[") and '"image"' in text and '"labels"' in text


def read(reading: Reading) -> Found:
    """See the package."""
    content = read_json(reading.root)
    if not isinstance(content, list):
        raise UserError(f"{reading.root}: expected a list of images with their labels")
    pictures = []
    missing = []
    for place, entry in enumerate(content):
        where = f"{reading.root}: entry {place}"
        try:
            name, label = entry["image"], entry["labels"][0]["class"]
        except (TypeError, KeyError, IndexError):
            raise UserError(f"{where} needs an image and labels") from None
        if not isinstance(name, str) or not isinstance(label, str) or not label:
            raise UserError(f"{where} needs the path of an image and the name of a class")
        image = reading.image(name)
        if image is None:
            missing.append(name)
        elif (size := reading.size(image)) is not None:
            pictures.append(Picture(image, "", size, label=label))
    reading.missing(missing, reading.root)
    return Found(pictures, tuple(sorted({picture.label or "" for picture in pictures})))
