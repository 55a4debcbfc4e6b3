"""Names: how options are spelled, what a mistyped one may have meant, which classes are no objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: Classes of these names are the ground that objects stand on: no objects themselves, and grey in pictures.
GROUND = frozenset({"background", "other", "void", "unlabeled", "unlabelled"})


def dashed(name: str) -> str:
    """The command line's spelling of a key: `batch_size` -> `batch-size`."""
    return name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean X?"` for the closest known name, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first names, and how many there are besides."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
