"""What tools write in COCO files where COCO's definition says something else, put plainly before it is checked.

Only values whose meaning is plain are changed, and every change is counted; whatever else is wrong stays for the checks
of `data.coco` to name. Seen in exports of Roboflow, CVAT, Label Studio, VIA, labelme's converters and spreadsheets.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

TEXT = "numbers written as text, read as numbers"
TWIN_IMAGES = "images listed twice, read once"
TWIN_OBJECTS = "annotations listed twice, read once"
TWIN_CATEGORIES = "categories listed twice, read once"
NOTHING = "annotations without box and mask, taken as 'nothing here'"
ROOT = "root categories without objects, not a class"
SIZES = "image sizes that are null, zero or fractions, read from the files"

#: Iscrowd and ignore, as text.
NO, YES = ("", "0", "0.0", "false", "no", "none", "null"), ("1", "1.0", "true", "yes")


class Content(NamedTuple):
    """The entries of a file, plain where that could be done; the rest as it is.

    Attributes:
        images, categories: the entries.
        annotations: (position in the file, entry).
        notes: counts of what was changed, by kind.
    """

    images: list[Any]
    categories: list[Any]
    annotations: list[tuple[int, Any]]
    notes: Counter[str]


def plain(images: list[Any], categories: list[Any], annotations: list[Any]) -> Content:
    """Put the entries of a COCO file plainly. The arguments are not changed."""
    notes: Counter[str] = Counter()
    images = _once((_image(entry, notes) for entry in images), ("id", "file_name"), notes, TWIN_IMAGES)
    categories = _once((_category(entry) for entry in categories), ("id", "name"), notes, TWIN_CATEGORIES)
    placed = _annotations(annotations, _names(images), _names(categories), notes)
    used = {_hashable(entry.get("category_id")) for _, entry in placed if isinstance(entry, dict)}
    roots = _roots(categories, used)
    notes[ROOT] += len(roots)
    return Content(images, [entry for entry in categories if entry not in roots], placed, +notes)


def _image(entry: Any, notes: Counter[str]) -> Any:
    if not isinstance(entry, dict):
        return entry
    entry = {**entry, "id": whole(entry.get("id"))} if "id" in entry else entry
    sides = {side: entry[side] for side in ("width", "height") if side in entry}
    as_numbers = {side: _number(value) for side, value in sides.items()}
    if any(isinstance(value, str) for value in sides.values()) and None not in as_numbers.values():
        notes[TEXT] += 1
    # None, 0, -1 (VIA's "unknown") and 640.5 say nothing: without the keys the file is asked.
    unknown = [s for s, v in sides.items() if v is None or ((n := as_numbers[s]) is not None and not _is_side(n))]
    if unknown:
        notes[SIZES] += 1
        return {key: value for key, value in entry.items() if key not in ("width", "height")}
    return {**entry, **{side: int(n) for side, n in as_numbers.items() if n is not None}}


def _is_side(number: float) -> bool:
    return number >= 1 and (isinstance(number, int) or (math.isfinite(number) and number.is_integer()))


def _category(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    name = whole(entry.get("name"))
    number = isinstance(name, (int, float)) and not isinstance(name, bool)
    changed = {"id": whole(entry["id"])} if "id" in entry else {}
    return {**entry, **changed, **({"name": str(name)} if number else {})}


def _roots(categories: list[Any], used: set[Any]) -> list[Any]:
    """Roboflow's first category names the project, is above all others and has no object."""
    entries = [entry for entry in categories if isinstance(entry, dict)]
    above = Counter(_hashable(entry.get("supercategory")) for entry in entries)
    return [
        entry
        for entry in entries
        if entry.get("supercategory") in ("none", "", None)
        and above[_hashable(entry.get("name"))] >= 1
        and _hashable(entry.get("id")) not in used
    ]


def _annotations(
    annotations: list[Any], images: dict[Any, Any], categories: dict[Any, Any], notes: Counter[str]
) -> list[tuple[int, Any]]:
    result: list[tuple[int, Any]] = []
    seen: dict[int, int] = {}  # hash of image, class and box -> position in `result`
    for place, entry in enumerate(annotations):
        if not isinstance(entry, dict):
            result.append((place, entry))
            continue
        if "image_id" in entry and entry.get("bbox") in (None, []) and not _has_mask(entry.get("segmentation")):
            notes[NOTHING] += 1
            continue
        entry = _annotation(entry, images, categories, notes)
        key = hash(tuple(_hashable(entry.get(name)) for name in ("image_id", "category_id", "bbox", "iscrowd")))
        twin = seen.setdefault(key, len(result))
        if twin < len(result) and _same(entry, result[twin][1]):
            notes[TWIN_OBJECTS] += 1
            continue
        result.append((place, entry))
    return result


def _annotation(
    entry: dict[str, Any], images: dict[Any, Any], categories: dict[Any, Any], notes: Counter[str]
) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name, known in (("image_id", images), ("category_id", categories)):
        if name in entry:
            value = known.get(_canonical(entry[name]), whole(entry[name]))
            if isinstance(value, str) != isinstance(entry[name], str):
                notes[TEXT] += 1
            changed[name] = value
    for name in ("iscrowd", "ignore"):
        if isinstance(value := entry.get(name), str) and value.strip().lower() in (*NO, *YES):
            notes[TEXT] += 1
            changed[name] = int(value.strip().lower() in YES)
    for name in ("bbox", "keypoints"):
        value = entry.get(name)
        if isinstance(value, list) and any(isinstance(v, str) for v in value):
            numbers = [_number(v) for v in value]
            if None not in numbers:
                notes[TEXT] += 1
                changed[name] = numbers
    if "segmentation" in entry:
        changed["segmentation"] = _polygons(entry["segmentation"])
    return {**entry, **changed}


def _polygons(value: Any) -> Any:
    """A single flat polygon (VIA), or lists of points, as a list of flat polygons."""
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(v, (int, float)) for v in value):
        return [value]
    if not _has_mask(value):
        return []
    points = [isinstance(v, list) and bool(v) and all(isinstance(p, list) and len(p) == 2 for p in v) for v in value]
    return [[x for point in v for x in point] if pairs else v for v, pairs in zip(value, points, strict=True)]


def _has_mask(value: Any) -> bool:
    """Whether there is anything in a segmentation."""
    return any(value) if isinstance(value, list) else bool(value)


def _same(a: Any, b: Any) -> bool:
    """Whether two annotations differ in nothing but their ids."""
    return isinstance(b, dict) and all(
        a.get(key) == b.get(key) for key in ("image_id", "category_id", "bbox", "segmentation", "iscrowd", "keypoints")
    )


def _once(entries: Iterable[Any], keys: tuple[str, ...], notes: Counter[str], note: str) -> list[Any]:
    """Without the entries that repeat an earlier one in all of `keys`."""
    result, seen = [], set()
    for entry in entries:
        if isinstance(entry, dict):
            key = tuple(_hashable(entry.get(name)) for name in keys)
            if key in seen:
                notes[note] += 1
                continue
            seen.add(key)
        result.append(entry)
    return result


# -- numbers and ids --------------------------------------------------------------------------------------------------


def whole(value: Any) -> Any:
    """A float that is a whole number as one; anything else as it is."""
    return int(value) if isinstance(value, float) and math.isfinite(value) and value == int(value) else value


def _number(value: Any) -> float | None:
    """A number, also of text; None if it is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, int):
        return value
    try:
        return whole(float(value))
    except ValueError:
        return None


def _canonical(key: Any) -> Any:
    """An id such that "7", 7.0 and 7 are the same; "007" is a name."""
    key = whole(key)
    if isinstance(key, str) and key.isascii() and key.isdigit() and (key == "0" or key[0] != "0") and len(key) < 40:
        return int(key)
    return _hashable(key)


def _names(entries: list[Any]) -> dict[Any, Any]:
    """Canonical id -> the id as it is; empty if two ids differ only in being text."""
    ids = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), (int, str))]
    found = {_canonical(key): key for key in ids}
    return found if len(found) == len(set(ids)) else {}


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
