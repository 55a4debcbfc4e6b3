"""YOLO labels: a text file per image, a line per object, `class x y w h` or `class x1 y1 x2 y2 x3 y3 ...` in fractions.

Class names and folders are in `data.yaml`, as Ultralytics and Roboflow write it, or names alone in `classes.txt` or
`obj.names`, as labelImg, Label Studio and CVAT do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgformer.core.errors import UserError
from sgformer.core.parse import MAX_YAML, parse_yaml
from sgformer.data.image import IMAGE_EXTENSIONS, walk
from sgformer.data.sources.base import (
    SPLIT_WORDS,
    Found,
    Picture,
    Reading,
    Thing,
    first_files,
    head,
    number,
    read_lines,
    read_text,
    split_named,
)

NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "predefined_classes.txt", "_darknet.labels")
EMPTY = "images without a label file, taken as without objects"
SCORES = "boxes with a score, which is left out"
KEYPOINTS = "objects with keypoints, which are left out"
#: Tools round: a fraction may exceed the image by this.
SLACK = 0.05


def detects(root: Path) -> bool:
    """Whether there is a YAML file with names, or lines of numbers in text files."""
    if root.is_file():
        return root.suffix.lower() in (".yaml", ".yml") and "names" in head(root)
    if any("names:" in head(path) for path in (*root.glob("*.yaml"), *root.glob("*.yml"))):
        return True
    names = {*NAME_FILES, "train.txt", "val.txt", "test.txt", "readme.txt"}
    for path in first_files(root, ".txt", count=20):
        if path.name.lower() not in names and (line := head(path, 400).split("\n")[0].split()):
            return len(line) >= 5 and all(_is_number(word) for word in line)
    return False


def read(reading: Reading) -> Found:
    """See the package."""
    settings, source = _settings(reading)
    names, named_in = _names(reading, settings, source)
    keypoints = settings.get("kpt_shape")
    pictures = []
    for image, split in _images(reading, settings, source):
        labels = _label_file(image)
        if labels is not None and labels.name in NAME_FILES:
            continue
        if (size := reading.size(image)) is None:
            continue
        reading.notes[EMPTY] += labels is None
        things = [
            _thing(line.split(), f"{labels}, line {row}", size, names, named_in, bool(keypoints), reading)
            for row, line in enumerate(read_text(labels).splitlines() if labels else [], 1)
            if line.strip()
        ]
        pictures.append(Picture(image, split, size, things))
    if pictures and reading.notes[EMPTY] == len(pictures):
        raise UserError(
            f"{reading.root}: none of {len(pictures)} images has a label file; they belong beside the images, or into "
            "`labels` where the images are in `images`"
        )
    return Found(pictures, tuple(names))


def _settings(reading: Reading) -> tuple[dict[str, Any], Path | None]:
    if reading.root.is_file():
        files = [reading.root]
    else:
        files = [*sorted(reading.folder.glob("*.yaml")), *sorted(reading.folder.glob("*.yml"))]
        files = [path for path in files if "names" in head(path, 2**20)]
    if not files:
        return {}, None
    path = files[0]
    settings = parse_yaml(read_text(path, 4 * MAX_YAML), path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected `train:`, `val:` and `names:`")
    return settings, path


def _names(reading: Reading, settings: dict[str, Any], source: Path | None) -> tuple[list[str], Path]:
    if reading.table is not None:
        return read_lines(reading.table), reading.table
    if source is not None:
        names = settings.get("names")
        if isinstance(names, dict) and all(isinstance(key, int) for key in names):
            if sorted(names) != list(range(len(names))):
                raise UserError(f"{source}: the keys of names must be 0, 1, 2 ..., got {sorted(names)[:8]}")
            names = [names[i] for i in range(len(names))]
        if not isinstance(names, list) or not names or any(isinstance(name, (list, dict)) for name in names):
            raise UserError(f"{source}: names must be a list of class names, or lines `0: name`")
        return [str(name) for name in names], source
    for name in NAME_FILES:
        for path in (reading.folder / name, reading.folder / "labels" / name):
            if path.is_file():
                return read_lines(path), path
    raise UserError(
        f"{reading.root}: no class names: expected data.yaml or {', '.join(NAME_FILES[:2])}; name a file with a class "
        "a line with --table"
    )


def _images(reading: Reading, settings: dict[str, Any], source: Path | None) -> list[tuple[Path, str]]:
    """(image, split): those of the folders that the settings name, else all."""
    result: dict[Path, str] = {}
    for split, words in SPLIT_WORDS.items():
        entries: Any = next((settings[word] for word in words if settings.get(word)), [])
        for entry in entries if isinstance(entries, list) else [entries]:
            for image in _entry(reading, str(entry), str(settings.get("path") or ""), source):
                result.setdefault(image, split)
    if not result:
        return [(path, reading.split(path)) for path in reading.images()]
    return list(result.items())


def _entry(reading: Reading, entry: str, base: str, source: Path | None) -> list[Path]:
    """The images of a folder or of a list of files, found below the source by as much of the path as is there."""
    parts = [
        p for p in (*base.replace("\\", "/").split("/"), *entry.replace("\\", "/").split("/")) if p not in ("", ".")
    ]
    while ".." in parts:
        parts = parts[parts.index("..") + 1 :]
    for place in reading.places:
        for start in range(len(parts) + 1):
            path = place.joinpath(*parts[start:])
            if start == len(parts) and entry.strip("./\\"):
                break  # the whole folder stands for an empty path only
            if path.is_dir():
                return sorted(walk(path, IMAGE_EXTENSIONS))
            if path.is_file() and path.suffix.lower() == ".txt":
                found = [(line, reading.image(line, path.parent)) for line in read_lines(path)]
                reading.missing([line for line, image in found if image is None], path)
                return [image for _, image in found if image is not None]
    # Splits that are named but not delivered (Roboflow's `test`) are none.
    if split_named(*reversed(parts)) == "test":
        return []
    raise UserError(f"{source}: {entry} is not below {reading.places[0]}; name the folder of the images with --images")


def _label_file(image: Path) -> Path | None:
    parts = list(image.parts)
    places = [image.with_suffix(".txt")]
    for i in range(len(parts) - 2, -1, -1):
        if parts[i].lower() == "images":
            places.insert(0, Path(*parts[:i], "labels", *parts[i + 1 :]).with_suffix(".txt"))
            break
    return next((path for path in places if path.is_file()), None)


def _thing(
    words: list[str],
    where: str,
    size: tuple[int, int],
    names: list[str],
    named_in: Path,
    keypoints: bool,
    reading: Reading,
) -> Thing:
    numbers = [number(word, where, "every word") for word in words]
    index, values = numbers[0], numbers[1:]
    if index != int(index) or not 0 <= index < len(names):
        raise UserError(f"{where}: class {words[0]}, but {named_in} has {len(names)} names: 0 to {len(names) - 1}")
    label = names[int(index)]
    if keypoints and len(values) > 4:
        reading.notes[KEYPOINTS] += 1
        values = values[:4]
    if len(values) == 5:
        reading.notes[SCORES] += 1
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise UserError(f"{where}: expected `class x y w h` or `class x1 y1 x2 y2 x3 y3 ...`, got {len(words)} numbers")
    if not all(-SLACK <= v <= 1 + SLACK for v in values):
        wrong = next(v for v in values if not -SLACK <= v <= 1 + SLACK)
        raise UserError(f"{where}: coordinates are fractions of the image's width and height, 0 to 1; got {wrong:g}")
    width, height = size
    if len(values) == 4:
        x, y, w, h = values
        return Thing(label, ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height))
    return Thing(label, polygons=[[v * (height if i % 2 else width) for i, v in enumerate(values)]])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
