"""What weights and exported files say of themselves, checked before anything is built from it: a stranger may have
written it, with a right checksum. No torch here: exported files are read without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sgformer.core.errors import UserError
from sgformer.core.parse import MAX_SMALL, parse_json
from sgformer.models.config import MAX_CLASSES, SGFormerConfig

MIN_SIDE, MAX_SIDE = 32, 4096  # pixels of an image size; a larger one is given with --image-size
MIN_CROP = 0.1  # of `crop_pct`
MAX_WIDTH = 2**13  # channels of heads
MAX_NAME = 4096  # characters
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # Pillow's


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any, least: float = -1e300, most: float = 1e300) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) else [value, value]
    return len(sides) == 2 and all(_is_whole(side, MIN_SIDE, MAX_SIDE) for side in sides)


def _are(one: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list | tuple)
        and (len(value) == length if length else len(value) <= MAX_CLASSES)
        and all(map(one, value))
    )


_SIZE = f"a side or a height and a width, each of {MIN_SIDE} to {MAX_SIDE} pixels"
_YES = "true or false"

# Of each known entry: what it must be, in words and as a function. Others are the writer's own and nowhere read.
KNOWN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "task": ("a name", _is_name),
    "model": ("a name", lambda v: v is None or _is_name(v)),
    "timm_model": ("a name", _is_name),
    "classes": ("a list of names", _are(_is_name)),
    "wordnet": ("a list of names", _are(_is_name)),
    "category_ids": ("a list of numbers or names", _are(lambda v: _is_name(v) or _is_whole(v, -(2**63), 2**63))),
    "keypoints": ("a list of names", _are(_is_name)),
    "skeleton": ("pairs of numbers from 1", _are(_are(lambda v: _is_whole(v, 1, MAX_CLASSES), 2))),
    "sigmas": ("numbers above 0", _are(lambda v: _is_number(v, 1e-6, 1))),
    "num_classes": (f"a number from 0 to {MAX_CLASSES}", lambda v: _is_whole(v, 0, MAX_CLASSES)),
    "image_size": (_SIZE, _is_size),
    "input_size": (f"null, or {_SIZE}", lambda v: v is None or (isinstance(v, list) and _is_size(v))),
    "short_side": (f"{MIN_SIDE} to {MAX_SIDE} pixels", lambda v: _is_whole(v, MIN_SIDE, MAX_SIDE)),
    "multiple": ("a number of pixels from 1 to 256", lambda v: _is_whole(v, 1, 256)),
    "crop_pct": (f"a number from {MIN_CROP} to 1", lambda v: _is_number(v, MIN_CROP, 1)),
    "interpolation": (f"one of {', '.join(INTERPOLATIONS)}", lambda v: v in INTERPOLATIONS),
    "mean": ("three numbers", _are(lambda v: _is_number(v, -1e3, 1e3), 3)),
    "std": ("three numbers above 0", _are(lambda v: _is_number(v, 1e-6, 1e3), 3)),
    "reduce_zero_label": (_YES, lambda v: isinstance(v, bool)),
    "binary": (_YES, lambda v: isinstance(v, bool)),
    "val_split": ("a fraction", lambda v: _is_number(v, 0, 1)),
    "metrics": ("numbers by name", lambda v: isinstance(v, dict) and all(map(_is_name, v))),
    "epoch": ("a number", _is_number),
    "step": ("a number", _is_number),
    "outputs": ("a list of names", _are(_is_name)),
    "part": ("a name", _is_name),
    "architecture": ("a mapping", lambda v: isinstance(v, dict)),
}


def parse_metadata(text: str, name: Any) -> dict[str, Any]:
    """The metadata in JSON text, with every known entry of its type and within its bounds.

    Raises:
        UserError: they are not; names `name` and the entry.
    """
    if len(text) > MAX_SMALL:
        raise UserError(f"{name}: its metadata are larger than {MAX_SMALL} characters")
    metadata = parse_json(text, f"{name}: its metadata")
    if not isinstance(metadata, dict):
        raise UserError(f"{name}: its metadata are no mapping")
    for key, (what, holds) in KNOWN.items():
        if key in metadata and not holds(metadata[key]):
            raise UserError(f"{name}: its metadata are invalid: {key} must be {what}, got {_short(metadata[key])}")
    for key in ("wordnet", "category_ids"):
        if key in metadata and len(metadata[key]) != len(metadata.get("classes", ())):
            raise UserError(f"{name}: its metadata are invalid: {key} must be as many as the classes")
    points = len(metadata.get("keypoints", ()))
    if len(metadata.get("sigmas", range(points))) != points:
        raise UserError(f"{name}: its metadata are invalid: sigmas must be as many as the keypoints")
    if any(end > points for edge in metadata.get("skeleton", ()) for end in edge):
        raise UserError(f"{name}: its metadata are invalid: skeleton must be pairs of numbers of keypoints")
    return metadata


def require(metadata: Mapping[str, Any], keys: tuple[str, ...], name: Any) -> None:
    """Raise UserError if an entry is missing; `name` is the file's."""
    if missing := [key for key in keys if key not in metadata]:
        raise UserError(f"{name}: its metadata lack {', '.join(missing)}: is it of another program or version?")


def parse_config(text: str) -> SGFormerConfig:
    """The config in JSON text.

    Raises:
        ValueError: it is none, or a value of another type or beyond its bounds.
    """
    if len(text) > MAX_SMALL:
        raise ValueError(f"larger than {MAX_SMALL} characters")
    return as_config(parse_json(text, "config"))


def as_config(values: Any) -> SGFormerConfig:
    """A config from `SGFormerConfig.to_dict`'s output.

    Raises:
        ValueError: see `parse_config`.
    """
    try:
        return SGFormerConfig.from_dict(values)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(str(error)) from None


def check_architecture(architecture: Mapping[str, Any]) -> SGFormerConfig | None:
    """The config of the backbone in the `architecture` of a network with heads; None if it is not an SG-Former.

    Raises:
        ValueError: an entry is missing, of another type or beyond its bounds.
    """
    backbone = architecture.get("backbone")
    if not isinstance(backbone, dict) or not _is_name(backbone.get("model")):
        raise ValueError("the architecture names no backbone")
    for key, what, holds in (
        ("head", "a name", _is_name),
        ("num_classes", f"a number from 1 to {MAX_CLASSES}", lambda v: _is_whole(v, 1, MAX_CLASSES)),
        ("keypoints", f"a number from 1 to {MAX_CLASSES}", lambda v: _is_whole(v, 1, MAX_CLASSES)),
        ("width", f"a number from 1 to {MAX_WIDTH}", lambda v: v is None or _is_whole(v, 1, MAX_WIDTH)),
    ):
        if key in architecture and not holds(architecture[key]):
            raise ValueError(f"{key} must be {what}, got {_short(architecture[key])}")
    return as_config(backbone["config"]) if "config" in backbone else None


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
