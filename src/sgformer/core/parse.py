"""JSON, YAML and CSV that a stranger may have written: read within bounds of size, depth and length, or refused in one
line that names the file.

The libraries read what is well-formed, whatever it costs: YAML's aliases make a gigabyte of 400 bytes as soon as the
value is printed, nesting of some hundred levels ends the functions that walk through it, and integers of thousands of
digits or dates that do not exist raise errors of other kinds than theirs.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import re
import stat
from typing import Any

from sgformer.core.errors import UserError, first_line

MAX_TEXT = 2**30  # bytes of annotations and tables
MAX_SMALL = 2**22  # bytes of what has a few entries for a class
MAX_YAML = 2**18  # characters, which take PyYAML some seconds; 10,000 classes
MAX_DEPTH = 32  # levels of lists and mappings
MAX_NUMBER = 40  # characters of a number in YAML
NO_BRACKETS = bytes(set(range(256)) - set(b'[]{}"'))


def read_bytes(path: str | os.PathLike[str], limit: int | None = MAX_TEXT) -> bytes:
    """The content of a file.

    Raises:
        UserError: it is missing, cannot be read, or has more than `limit` bytes; names it.
    """
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            most = limit if limit is None or not stat.S_ISREG(about.st_mode) else min(about.st_size, limit)
            data = file.read() if most is None else file.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    if limit is not None and len(data) > limit:
        raise UserError(f"{path}: more than {limit} bytes, too many for such a file")
    return data


def _text(data: bytes, name: Any) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name}: not a text file in UTF-8") from None


# -- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes, name: Any) -> Any:
    """A value of JSON text, not nested deeper than some `MAX_DEPTH` levels; `name` is its file's, for errors.

    Raises:
        UserError: it is none.
    """
    try:
        text = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        value, text = None, "[" * (MAX_DEPTH + 1)
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{name}: malformed JSON ({first_line(error)})") from None
    if _is_deep(text):
        raise UserError(f"{name}: malformed JSON: nested deeper than {MAX_DEPTH} levels")
    return value


def _is_deep(text: str) -> bool:
    """Whether the brackets outside of strings are nested too deep; of JSON that has been parsed, in a fifth of that
    time."""
    data = text.encode("utf-8", "surrogatepass")
    if b"\\" in data:
        data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    brackets = re.sub(rb'"[^"]*"', b"", data.translate(None, NO_BRACKETS))
    for _ in range(MAX_DEPTH):  # each removes the innermost level
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return bool(brackets)


def read_json(path: str | os.PathLike[str], limit: int | None = MAX_TEXT) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: see `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, limit), path)


# -- YAML -------------------------------------------------------------------------------------------------------------


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader without aliases, tags, dates and endless numbers."""
    import yaml

    class Loader(yaml.SafeLoader):
        level = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.composer.ComposerError(None, None, "aliases (*) are not read", self.peek_event().start_mark)
            self.level += 1
            if self.level > MAX_DEPTH:
                what = f"nested deeper than {MAX_DEPTH} levels"
                raise yaml.composer.ComposerError(None, None, what, self.peek_event().start_mark)
            node = super().compose_node(parent, index)
            self.level -= 1
            return node

        def construct_number(self, node: Any) -> Any:
            if len(node.value) > MAX_NUMBER:
                what = f"a number of {len(node.value)} characters"
                raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
            return (self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float)(node)

    plain = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "str", "seq", "map")}
    known = {tag: how for tag, how in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in plain}
    numbers = {f"tag:yaml.org,2002:{kind}": Loader.construct_number for kind in ("int", "float")}
    Loader.yaml_constructors = {**known, **numbers}
    Loader.yaml_implicit_resolvers = {  # a date is text
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith("timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def parse_yaml(text: str, name: Any) -> Any:
    """A value of YAML text: null, truth values, numbers, text, lists and mappings; `name` is its file's, for errors.

    Raises:
        UserError: it is none, too long, too deep, or has aliases, tags or numbers of more than `MAX_NUMBER` characters.
    """
    import yaml

    if len(text) > MAX_YAML:
        raise UserError(f"{name}: more than {MAX_YAML} characters, too many for such a file")
    try:
        return yaml.load(text, _loader())
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(f"{name}: not a YAML file{where}: {' '.join(str(error.problem).split())[:200]}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # `0b_` is no number after all
        raise UserError(f"{name}: not a YAML file: {first_line(error)}") from None


def check_text(text: str, name: Any) -> None:
    """Raise UserError if text has aliases or is nested deeper than `MAX_DEPTH` levels, should it be read as YAML."""
    import yaml

    if "*" not in text and len(text) <= MAX_DEPTH:
        return
    level = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or level > MAX_DEPTH:
                raise UserError(f"{name}: neither aliases (*) nor more than {MAX_DEPTH} levels are read as a value")
    except yaml.YAMLError:  # whoever reads it comes no further
        pass


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value in a YAML file.

    Raises:
        UserError: see `read_bytes` and `parse_yaml`.
    """
    return parse_yaml(_text(read_bytes(path, 4 * MAX_YAML), path), path)


# -- tables -----------------------------------------------------------------------------------------------------------


def parse_csv(text: str, name: Any, delimiter: str = ",") -> list[list[str]]:
    """The rows of a table; `name` is its file's, for errors.

    Raises:
        UserError: it is none.
    """
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{name}: not a CSV table ({first_line(error)})") from None


def read_rows(path: str | os.PathLike[str]) -> list[list[str]]:
    """The rows of a CSV file in UTF-8.

    Raises:
        UserError: see `read_bytes` and `parse_csv`.
    """
    return parse_csv(_text(read_bytes(path), path), path)


def read_table(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a CSV file in UTF-8 by the names in its first one, see `as_table`."""
    return as_table(_text(read_bytes(path), path), path)


def as_table(text: str, name: Any) -> list[dict[str, str]]:
    """The rows of a table by the names in its first one; cells that a row lacks are empty.

    Raises:
        UserError: it is none, or a row has more cells than there are names.
    """
    header, *rows = parse_csv(text, name) or [[]]
    for number, row in enumerate(rows, 2):
        if len(row) > len(header):
            raise UserError(f"{name}: row {number} has {len(row)} cells, and the first one {len(header)}")
    return [dict(zip(header, [*row, *[""] * (len(header) - len(row))], strict=True)) for row in rows if row]
