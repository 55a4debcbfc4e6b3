"""The keypoints of COCO's files: which ones an object has, where they are, and what becomes of them in a mirror."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sgformer.core.errors import UserError
from sgformer.core.names import quoted, visible

#: COCO files count whole pixels; boxes, masks and networks measure from the corner of the first one.
HALF = 0.5

POINTLESS = "objects without a labelled keypoint, of which the box alone is used"
OUTSIDE = "keypoints outside their image, not used"
MISCOUNTED = "annotations whose num_keypoints is not the number of their labelled keypoints"
WITHOUT = "annotations of classes without keypoints, left out"


class Skeleton(NamedTuple):
    """The keypoints that every object has.

    Attributes:
        names: in the order of their coordinates.
        edges: pairs of keypoints that are drawn connected, counted from 1 as in COCO's files.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...] = ()

    def to_metadata(self) -> dict[str, Any]:
        """As COCO's categories and the metadata of weights hold it."""
        return {"keypoints": list(self.names), "skeleton": [list(edge) for edge in self.edges]}

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Skeleton:
        """The skeleton of `to_metadata`."""
        edges = tuple((a, b) for a, b in metadata.get("skeleton", ()))
        return cls(tuple(metadata["keypoints"]), edges)


def read_skeleton(categories: Sequence[Any], file: Path) -> tuple[Skeleton | None, list[Any]]:
    """The skeleton of a file's categories, None if none has keypoints; and those of them that have it.

    Raises:
        UserError: `keypoints` or `skeleton` is malformed, or categories differ in their keypoints; names the category.
    """
    found: Skeleton | None = None
    having: list[Any] = []
    for entry in categories:
        names = entry.get("keypoints") if isinstance(entry, dict) else None
        if names in (None, []):
            continue
        where = f"{file}: category {_short(entry.get('name'))}"
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{where}: keypoints must be a list of names, got {_short(names)}")
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{where}: keypoints of the same name: {quoted(repeated)}")
        edges = entry.get("skeleton") or []
        ends = set(range(1, len(names) + 1))
        for edge in edges if isinstance(edges, list) else [edges]:
            if (
                not isinstance(edge, list)
                or len(edge) != 2
                or not all(type(end) is int and end in ends for end in edge)
            ):
                raise UserError(
                    f"{where}: skeleton must be pairs of keypoints, counted from 1 to {len(names)}, got {_short(edge)}"
                )
        skeleton = Skeleton(tuple(names), tuple((a, b) for a, b in edges))
        if found is not None and skeleton.names != found.names:
            raise UserError(
                f"{where} has other keypoints than {_short(having[0].get('name'))}: {_difference(skeleton, found)}; "
                "one network finds one set of keypoints: give every class the same, or train on a file for each"
            )
        found = found or skeleton
        having.append(entry)
    return found, having


def require_same(skeleton: Skeleton | None, known: Skeleton, file: Path, what: str = "training") -> None:
    """Raise UserError unless a file has the keypoints that training, or what else is named, knows."""
    if skeleton is None or skeleton.names != known.names:
        differs = "it has none" if skeleton is None else _difference(skeleton, known)
        raise UserError(f"{file}: its keypoints are not those of {what}: {differs}")


def _difference(one: Skeleton, other: Skeleton) -> str:
    if len(one.names) != len(other.names):
        return f"{len(one.names)} for {len(other.names)}"
    number, (a, b) = next(
        (i, pair) for i, pair in enumerate(zip(one.names, other.names, strict=True), 1) if len({*pair}) > 1
    )
    return f"number {number} is {visible(a)}, not {visible(b)}"


def read_keypoints(entry: Mapping[str, Any], skeleton: Skeleton, where: str) -> list[list[float]]:
    """Check the keypoints of an annotation: [x, y, visibility] of each, zeros for what is not labelled.

    Visibility is 0 (not labelled), 1 (labelled, hidden) or 2 (visible).

    Raises:
        UserError: their number, a coordinate or a visibility is invalid.
    """
    value, count = entry.get("keypoints"), len(skeleton.names)
    if value in (None, []):
        return [[0.0, 0.0, 0.0]] * count
    if not isinstance(value, list) or not all(map(_is_number, value)):
        raise UserError(f"{where}: keypoints must be numbers [x, y, visibility, ...], got {_short(value)}")
    if len(value) != 3 * count:
        raise UserError(
            f"{where}: {len(value)} numbers for keypoints, but its class has {count} of them, so x, y and visibility "
            f"are {3 * count}"
        )
    points = [[float(v) for v in value[i : i + 3]] for i in range(0, len(value), 3)]
    for name, point in zip(skeleton.names, points, strict=True):
        if point[2] not in (0, 1, 2):
            raise UserError(
                f"{where}: keypoint {visible(name)} has visibility {point[2]:g}; it must be 0 (not labelled), "
                "1 (hidden) or 2 (visible)"
            )
    return points


def usable(
    points: list[list[float]], entry: Mapping[str, Any], width: int, height: int, notes: Counter[str]
) -> list[list[float]]:
    """The keypoints of an object without those outside its image; counts what is not used."""
    labelled = sum(point[2] > 0 for point in points)
    if _is_number(entry.get("num_keypoints")) and entry["num_keypoints"] != labelled:
        notes[MISCOUNTED] += 1
    inside = [-HALF <= x <= width and -HALF <= y <= height for x, y, _ in points]
    outside = sum(point[2] > 0 and not there for point, there in zip(points, inside, strict=True))
    notes[OUTSIDE] += outside
    if labelled == outside:
        notes[POINTLESS] += 1
    return [point if point[2] and there else [0.0, 0.0, 0.0] for point, there in zip(points, inside, strict=True)]


# -- in a mirror ------------------------------------------------------------------------------------------------------

_SIDE = re.compile(r"(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}


def mirror_order(names: Sequence[str], pairs: Sequence[str] = ()) -> tuple[list[int], list[str], bool]:
    """The order of the keypoints in a mirrored image: `left_eye` comes where `right_eye` was.

    Args:
        names: of the keypoints.
        pairs: those that change places, "A:B"; by default names that differ in left and right alone.

    Returns:
        For each place the keypoint that comes there; the keypoints of one side that lack their twin on the other; and
        whether any keypoint has a side.

    Raises:
        UserError: a pair is malformed or names no keypoint.
    """
    place = {name: i for i, name in enumerate(names)}
    order = list(range(len(names)))
    for pair in pairs:
        ends = pair.split(":")
        if len(ends) != 2 or ends[0] == ends[1]:
            raise UserError(f"--flip-pairs: a pair is two keypoints, A:B, got {_short(pair)}")
        for end in ends:
            if end not in place:
                raise UserError(f"--flip-pairs {_short(pair)}: no keypoint {visible(end)}; there are {quoted(names)}")
            if order[place[end]] != place[end]:
                raise UserError(f"--flip-pairs {_short(pair)}: {visible(end)} is in two pairs")
        order[place[ends[0]]], order[place[ends[1]]] = place[ends[1]], place[ends[0]]
    if pairs:
        return order, [], True
    twins = {name: _SIDE.sub(lambda found: _OTHER.get(found[0], found[0]), name) for name in names}
    sided = {name: twin for name, twin in twins.items() if twin != name}
    for name, twin in sided.items():
        order[place[name]] = place.get(twin, place[name])
    return order, [name for name, twin in sided.items() if twin not in place], bool(sided)


# -- how far off still counts -----------------------------------------------------------------------------------------

# fmt: off
#: The keypoints of COCO's persons, whose sigmas pycocotools knows.
PERSON = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)
# fmt: on
#: Of other keypoints: a distance of a tenth of the object's size, the root of its area, has a similarity of exp(-1/2).
SIGMA = 0.05


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
