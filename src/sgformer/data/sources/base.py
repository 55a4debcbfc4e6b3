"""What all readers give, and what they share: finding images, reading small text files, naming splits."""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sgformer.core.errors import StalledError, UserError
from sgformer.core.names import some
from sgformer.core.parse import MAX_TEXT, parse_csv, parse_json, read_bytes
from sgformer.data.image import IMAGE_EXTENSIONS, probe_image, walk

T = TypeVar("T")

#: Folder names, and the beginnings of file names, of each split.
SPLIT_WORDS = {
    "train": ("train", "training", "train2017", "train2014"),
    "val": ("val", "valid", "validation", "val2017", "val2014", "dev"),
    "test": ("test", "testing", "test2017"),
}
#: Annotation files beyond this size are refused before parsing; COCO's own are read elsewhere.
MAX_XML = 2**22  # a tree takes some sixty times as much
SIDES = 64  # of the polygon that stands for a circle
#: What is left out with `--bad-images skip`, and is an error without.
UNREADABLE, ABSENT = LOST = ("images that cannot be read, left out", "images that are not there, left out")


@dataclass(frozen=True)
class Thing:
    """An object.

    Attributes:
        label: its class.
        box: [x1, y1, x2, y2] in pixels; None: that of its polygons.
        polygons: flat [x1, y1, x2, y2, ...] in pixels, or a COCO RLE; None if there is only a box.
        crowd: a region of many or of doubtful objects: not trained on, and no error in evaluation.
    """

    label: str
    box: tuple[float, float, float, float] | None = None
    polygons: Any = None
    crowd: bool = False


@dataclass
class Picture:
    """An image with what is known about it.

    Attributes:
        path: the file.
        split: "train", "val", "test", or "" where the source is not split.
        size: (width, height) in pixels as displayed; None where it was not needed.
        things: its objects, if the source has any.
        label: its class, of a source with a class per image.
        labels_of: gives the class of every pixel, (H, W) int, 255 for none; of a source with masks of all classes.
            None, if the mask cannot be read and images may be left out; `notes` of the reading counts it.
        data: the file's bytes, where they come from an annotation file.
    """

    path: Path
    split: str = ""
    size: tuple[int, int] | None = None
    things: list[Thing] = field(default_factory=list)
    label: str | None = None
    labels_of: Callable[[], np.ndarray | None] | None = None
    data: bytes | None = None


@dataclass
class Found:
    """A data set of another tool.

    Attributes:
        pictures: the images.
        classes: class names; their order is that of the class indices.
        notes: what was left out or taken otherwise, by kind, with counts.
    """

    pictures: list[Picture]
    classes: tuple[str, ...]
    notes: Counter[str] = field(default_factory=Counter)


class Reading:
    """A source that is being read: its images by name, and what was noted on the way.

    Images are found below the source's folder and below `images`, and nowhere else, whatever a file says.

    Args:
        root: file or folder.
        layout: what it will be written as.
        images: another folder of the images, or None.
        table: a file of class names or colours, or None.
        skip: leave out images whose header cannot be read, instead of raising.
    """

    def __init__(
        self,
        root: Path,
        layout: str = "coco",
        images: str | os.PathLike[str] | None = None,
        table: str | os.PathLike[str] | None = None,
        skip: bool = False,
    ):
        self.root, self.layout, self.skip = root, layout, skip
        self.folder = root if root.is_dir() else root.parent
        self.table = Path(table) if table else None
        self.notes: Counter[str] = Counter()
        if images is not None and not Path(images).is_dir():
            raise UserError(f"{images}: no such folder of images")
        self.places = [Path(images)] if images is not None else [self.folder]
        self._by_name: dict[str, list[Path]] | None = None

    def files(self, *suffixes: str) -> list[Path]:
        """Files below the source with one of these endings, sorted; hidden ones are passed over."""
        return sorted(walk(self.folder, suffixes)) if self.root.is_dir() else [self.root]

    def images(self) -> list[Path]:
        """All images, sorted."""
        return sorted(path for place in self.places for path in walk(place, IMAGE_EXTENSIONS))

    def image(self, name: str, near: Path | None = None) -> Path | None:
        """The image that a file means by a name or path, with or without its ending; None if there is none.

        Args:
            name: as it is written, maybe an absolute path of another machine.
            near: the folder of the file that says so; an image in it or with most of the path in common wins.
        """
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for path in self.images():
                for key in (path.name.lower(), path.stem.lower()):
                    self._by_name[key].append(path)
        parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
        if not parts:
            return None
        found = self._by_name.get(parts[-1].lower()) or self._by_name.get(Path(parts[-1]).stem.lower()) or []
        # A stem alone is no name of another image: "a.b" must not find "a.png".
        found = [p for p in dict.fromkeys(found) if parts[-1].lower() in (p.name.lower(), p.stem.lower())
                 or Path(parts[-1]).suffix.lower() in IMAGE_EXTENSIONS]  # fmt: skip
        if len(found) < 2:
            return found[0] if found else None

        def closeness(path: Path) -> tuple[int, int, int]:
            same = 0
            for mine, theirs in zip(reversed(path.parts[:-1]), reversed(parts[:-1]), strict=False):
                if mine != theirs:
                    break
                same += 1
            shared = os.path.commonpath([path.parent.absolute(), near.absolute()]) if near else ""
            return path.name.lower() == parts[-1].lower(), same, len(Path(shared).parts)

        return max(found, key=closeness)

    def size(self, image: Path | bytes, name: str | None = None) -> tuple[int, int] | None:
        """(width, height) in pixels as displayed; None if the header cannot be read and images may be left out.

        Args:
            image: a file, or its bytes.
            name: of bytes, for messages.

        Raises:
            UserError: it cannot be read.
        """
        header = self.readable(lambda: probe_image(image, name))
        return None if header is None else (header.width, header.height)

    def readable(self, read: Callable[[], T]) -> T | None:
        """What `read` gives; None, counted, if it raises UserError for an image and images may be left out.

        Raises:
            UserError: they may not; says how to leave them out.
        """
        try:
            return read()
        except UserError as error:
            if self.skip and not isinstance(error, StalledError):
                self.notes[UNREADABLE] += 1
                return None
            raise UserError(f"{error}; repair or remove it, or pass --bad-images skip") from None

    def split(self, path: Path) -> str:
        """The split that a file below the source belongs to by the names of its folders; "" if they name none."""
        base = next((p for p in (self.folder, *self.places) if path.is_relative_to(p)), self.folder)
        return split_named(*reversed(path.relative_to(base).parts[:-1])) if path.is_relative_to(base) else ""

    def missing(self, names: Sequence[str], source: Path) -> None:
        """Raise UserError about images that are not there; with `skip`, note them."""
        if not names:
            return
        if self.skip:
            self.notes[ABSENT] += len(names)
            return
        raise UserError(
            f"{source}: {len(names)} images are not below {', '.join(map(str, self.places))}: {some(list(names), 4)}; "
            "name their folder with --images, or leave them out with --bad-images skip"
        )


def split_named(*words: str) -> str:
    """The split that the first of some words names; "" if none does."""
    for word in words:
        for split, names in SPLIT_WORDS.items():
            if word.lower() in names:
                return split
    return ""


def ellipse(x: float, y: float, along: float, across: float, turned: float = 0.0) -> list[float]:
    """A flat polygon for an ellipse, or a circle: its centre, half axes, and turn in radians."""
    cos, sin = math.cos(turned), math.sin(turned)
    points = [
        (along * math.cos(2 * math.pi * i / SIDES), across * math.sin(2 * math.pi * i / SIDES)) for i in range(SIDES)
    ]
    return [v for u, w in points for v in (x + u * cos - w * sin, y + u * sin + w * cos)]


def first_files(folder: Path, *suffixes: str, count: int = 3) -> list[Path]:
    """Up to `count` files with one of these endings, or the file itself."""
    if folder.is_file():
        return [folder] if folder.suffix.lower() in suffixes else []
    return [path for path, _ in zip(walk(folder, suffixes), range(count), strict=False)]


# -- text -------------------------------------------------------------------------------------------------------------


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """A file of text: UTF-8 with or without a mark, UTF-16 with one, else Windows' western encoding.

    Raises:
        UserError: it cannot be read, is too large, or holds a null character.
    """
    data = read_bytes(path, limit)
    for encoding in ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise UserError(f"{path}: not a text file")


def head(path: Path, length: int = 4096) -> str:
    """The beginning of a file as text; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(length)
    except OSError:
        return ""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")


def read_json(path: Path) -> Any:
    """Raises UserError: not JSON; names the file."""
    return parse_json(read_text(path), path)


def read_csv(path: Path, delimiter: str = ",") -> list[list[str]]:
    """The rows of a table. Raises UserError: it is none; names the file."""
    return parse_csv(read_text(path), path, delimiter)


def read_lines(path: Path) -> list[str]:
    """The lines that are not empty, without blanks around them."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def number(text: Any, where: str, what: str) -> float:
    """A finite number.

    Raises:
        UserError: it is none; names `where` and `what`.
    """
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or isinstance(text, bool) or abs(value) > 1e9:
        raise UserError(f"{where}: {what} must be a number, got {str(text)[:40]!r}")
    return value
