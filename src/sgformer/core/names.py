"""Names: option spelling, suggestions for mistyped names, names from anywhere in texts, and the classes that count as
background."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

#: Background classes: not objects, and drawn in grey.
GROUND = frozenset({"background", "other", "void", "null", "unlabeled", "unlabelled"})


def dashed(name: str) -> str:
    """A key as the command line spells it: `batch_size` -> `batch-size`."""
    return name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean X?"` for the closest known name, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def canonical(name: str) -> str:
    """A name in Unicode's composed form (NFC) without blanks at its ends: equal for names that look alike.

    macOS decomposes the accents of file names (NFD), other systems keep what was typed.
    """
    return name.strip() if name.isascii() else unicodedata.normalize("NFC", name).strip()


def visible(name: str) -> str:
    """A name for messages, quoted and escaped where it would be mistaken for another: blanks at its ends, decomposed
    accents, characters that do not print."""
    return name if name and name == canonical(name) and name.isprintable() else ascii(name)


def quoted(names: Sequence[str], limit: int = 8) -> str:
    """As `some`, each name as `visible`."""
    return some([visible(name) for name in names[:limit]] + list(names[limit:]), limit)


def printable(text: str) -> str:
    """Text in one line: control characters and bytes of names that are not UTF-8 become escapes such as \\n, \\xff."""
    return "".join(character if character.isprintable() else escaped(character) for character in text)


def escaped(character: str) -> str:
    """A character as an escape in ASCII; of a file name's byte that is not UTF-8, the byte."""
    if "\udc80" <= character <= "\udcff":  # how Python keeps such a byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {character: f"\\{character}" for character in "\\`*_[]|$~"}
)


def markdown(value: object) -> str:
    """A value as text in Markdown, also in a cell of a table, that no character of it leaves or formats: neither
    Markdown nor HTML, formulas or links. Addresses lose their logins, which are not recognised once escaped."""
    text = printable(without_login(str(value))).translate(_MARKDOWN)
    return text.replace("://", ":\\//").replace("www.", "www\\.")


def is_address(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL, such as `s3://bucket/data`, and not a path."""
    return bool(re.match(r"[A-Za-z][\w+.-]*(::[\w+.-]+)*://", os.fspath(place)))


def is_remote(place: str) -> bool:
    """Whether opening a place may call another machine: an address, or a share of Windows."""
    return is_address(place) or bool(re.match(r"[\\/]{2}", place))


def without_login(text: str) -> str:
    """A text without the user names and passwords in its addresses: `ftp://user:word@host/x` -> `ftp://host/x`."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


LIST = 400  # characters of a list of names in a message


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first `limit` names, and the number of the remaining ones; very long names are cut, so that what a message
    says after them is seen."""
    shown, most = names[:limit], LIST // max(1, min(limit, len(names)))
    if sum(map(len, shown)) > LIST:
        shown = [name if len(name) <= most else f"{name[: most - 3]}..." for name in shown]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
