"""What a data set holds, by names: whether a run still sees the data that it began with.

Images count by name and truth, in their order, which random numbers depend on; where the folder is does not count.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from sgformer.core.errors import UserError
from sgformer.core.files import replacing
from sgformer.core.names import canonical, quoted, some
from sgformer.core.parse import parse_json


@dataclass(frozen=True)
class Contents:
    """The names in a split.

    Attributes:
        classes: class names in index order.
        entries: (name, truth) of each image in index order. The truth is what the listing knows of it: the class, a
            digest of the objects, or "".
    """

    classes: tuple[str, ...]
    entries: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, listing: Any) -> Contents:
        """The contents of a listing: its `classes` and `entries()`, or else the names of its files."""
        if hasattr(listing, "entries"):
            entries = listing.entries()
        else:
            entries = [(PurePath(str(listing.path(i))).name, "") for i in range(len(listing))]
        classes = tuple(map(canonical, getattr(listing, "classes", ())))
        return cls(classes, tuple((canonical(name), canonical(truth)) for name, truth in entries))

    def differences(self, now: Contents) -> list[str]:
        """How `now` differs, in a few words each; empty if it does not."""
        if lines := class_differences(self.classes, now.classes):
            return lines
        if self.entries == now.entries:
            return []
        before, after = Counter(name for name, _ in self.entries), Counter(name for name, _ in now.entries)
        lines = [
            f"{changed.total()} image{'s' * (changed.total() > 1)} {what} ({quoted(sorted(changed), 3)})"
            for changed, what in ((after - before, "added"), (before - after, "removed"))
            if changed
        ]
        truth = dict(self.entries)
        changed = [name for name, label in now.entries if name in truth and truth[name] != label]
        if changed:
            lines.append(f"annotations of {len(changed)} image{'s' * (len(changed) > 1)} changed ({some(changed, 3)})")
        return lines or ["the images are in another order"]


def class_differences(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """How class names in index order differ, in a few words each; empty if they do not."""
    before, now = [canonical(name) for name in before], [canonical(name) for name in now]
    lines = [
        f"class{'es' * (len(names) > 1)} {quoted(names)} {'are' if len(names) > 1 else 'is'} {what}"
        for names, what in (
            ([name for name in before if name not in set(now)], "gone"),
            ([name for name in now if name not in set(before)], "new"),
        )
        if names
    ]
    if not lines and before != now:
        return [f"the classes are in another order: {quoted(now)} instead of {quoted(before)}"]
    return lines


def names_in(metadata: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The names that each class of some weights goes by: its name and, if the weights have it, its WordNet ID, as
    ImageNet's folders are called. Empty if they name no classes."""
    names, ids = metadata.get("classes") or (), metadata.get("wordnet") or ()
    return [(name, *ids[i : i + 1]) for i, name in enumerate(names)]


def indices_in(metadata: Mapping[str, Any], classes: Sequence[str]) -> list[int | None]:
    """The index in some weights of each of these classes, by any of its names; None for a class they do not have."""
    known = {canonical(name): i for i, names in enumerate(names_in(metadata)) for name in reversed(names)}
    return [known.get(canonical(name)) for name in classes]


def write_contents(path: str | os.PathLike[str], splits: Mapping[str, Contents]) -> None:
    """Write the contents of splits as compressed JSON, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    value = {split: {"classes": one.classes, "images": one.entries} for split, one in splits.items()}
    with replacing(path) as unfinished:
        unfinished.write_bytes(gzip.compress(json.dumps(value).encode(), mtime=0))


def read_contents(path: str | os.PathLike[str]) -> dict[str, Contents] | None:
    """Read what `write_contents` wrote; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with gzip.open(path) as file:
            # Names repeat themselves, but not so often.
            limit = 2**24 + 64 * os.stat(path).st_size
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError("too large")
        value = parse_json(data, path)
        found = {
            split: Contents(tuple(one["classes"]), tuple((name, truth) for name, truth in one["images"]))
            for split, one in value.items()
        }
        words = (word for one in found.values() for words in (one.classes, *one.entries) for word in words)
        if not {"train", "val"} <= found.keys() or not all(isinstance(word, str) for word in words):
            raise ValueError("not names")
        return found
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}); remove it to resume without comparing the data"
        ) from None
