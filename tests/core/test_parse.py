"""JSON, YAML and CSV of strangers: what is plain is read, anything else is a line that names the file."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import sgformer
from sgformer.core.errors import UserError
from sgformer.core.parse import (
    MAX_DEPTH,
    MAX_YAML,
    as_table,
    check_text,
    parse_csv,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_table,
    read_yaml,
)

SOURCE = Path(sgformer.__file__).parent


def nested(levels, left="[", right="]"):
    return left * levels + right * levels


def bomb(levels=9):
    """Nine references to nine references to ...: 9 ** levels words."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)])


def test_files_are_parsed_in_one_place():
    """Elsewhere, what this program wrote itself, or in tables only the names of the columns; XML has its own reader."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"(json|pickle|marshal|plistlib|tomllib)\.loads?|yaml\.\w*load\w*|csv\.(reader|DictReader)|"
                r"ElementTree\.\w+|(ast\.literal_)?eval|exec|(np|numpy)\.(load\w*|genfromtxt)|torch\.load",
                ast.unparse(node.func),
            ):
                found.add(path.relative_to(SOURCE).as_posix())
    own = {"training/ranks.py", "training/callbacks.py", "exporting/formats/hub.py", "bench/memory.py", "data/coco.py"}
    checked = {"models/released.py", "training/trainer.py", "training/recorder.py", "data/sources/voc.py"}
    assert found == {"core/parse.py", *own, *checked}


TEXT = st.text("abé漢 :-#'\"[]{},1.?!|>%@\\\n", max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e9, 1e9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_plain_json_is_read_as_the_library_reads_it(value):
    text = json.dumps(value)
    assert parse_json(text, "x") == parse_json(text.encode("utf-16"), "x") == value


@given(PLAIN)
def test_plain_yaml_is_read_as_the_library_reads_it(value):
    text = yaml.safe_dump(value, allow_unicode=True)
    if "*id" not in text:  # of a list or mapping that is there twice
        assert parse_yaml(text, "x") == yaml.safe_load(text) == value


@pytest.mark.parametrize(
    "text", [nested(MAX_DEPTH), '["' + nested(900) + '"]', r'["\"", "\\", [["]", "\\\""]]]', "1e5", '"x"']
)
def test_json_within_the_bounds(text):
    assert parse_json(text, "x") == json.loads(text)


@pytest.mark.parametrize(
    "text, says",
    [
        (nested(2 * MAX_DEPTH + 1), "nested deeper"),
        (nested(100_000), "nested deeper"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested deeper"),
        ('["]",' * 50 + "1" + "]" * 50, "nested deeper"),
        (r'["\"]",' * 200 + "1" + "]" * 200, "nested deeper"),
        ("[1," * 200, "line 1"),
        ("9" * 5000, "malformed JSON"),
        ("{} x", "malformed JSON at line 1, column 4"),
        (b"\xff", "malformed JSON"),
        ("", "malformed JSON"),
    ],
)
def test_json_beyond_the_bounds(text, says):
    with pytest.raises(UserError, match=rf"^a\.json: .*{says}"):
        parse_json(text, "a.json")


@pytest.mark.parametrize(
    "text, says",
    [
        (bomb(), "line 2.*aliases"),
        ("a: &x 1\nb: *x", "line 2.*aliases"),
        ("a: *x", "line 1.*aliases"),
        (nested(MAX_DEPTH + 1), "nested deeper"),
        ("[" * 5000, "nested deeper"),
        ("- " * 5000 + "a", "nested deeper"),
        ("9" * 5000, "a number of 5000 characters"),
        ("0x" + "f" * 5000, "a number of"),
        ("1" + ":59" * 5000, "a number of"),
        ("." + "9" * 5000, "a number of"),
        ("0b_", "not a YAML file"),
        ("!!python/object/apply:os.system ['true']", "tag"),
        ("!!binary aGk=", "tag"),
        ("!!set {a}", "tag"),
        ("!!timestamp 2020-99-99", "tag"),
        ("? [a]\n: 1", "unhashable"),
        ("a: 1\n---\nb: 2", "line 2.*another document"),
        ("a: [", "line 1"),
        ("\x01", "special characters"),
        ("a" * (MAX_YAML + 1), "too many"),
    ],
)
def test_yaml_beyond_the_bounds(text, says):
    with pytest.raises(UserError, match=rf"^a\.yaml: .*{says}") as caught:
        parse_yaml(text, "a.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_date_is_text():
    assert parse_yaml("a: 2020-01-31\nb: 2020-99-99\nc: 2020-01-01 10:00:00", "x") == {
        "a": "2020-01-31",
        "b": "2020-99-99",
        "c": "2020-01-01 10:00:00",
    }


def test_text_that_others_read_as_yaml():
    for text in ("runs/*/best", "a*b", "[1, 2]", "&", "x" * 500, "- - a", "[*"):
        check_text(text, "x")
    for text in ("[&a [x], *a]", "*a", nested(MAX_DEPTH + 1), "- " * 40 + "a"):
        with pytest.raises(UserError, match=r"^x: "):
            check_text(text, "x")


def test_tables():
    assert as_table("a,b\r\n1,2\r\n3\r\n\r\n", "x") == [{"a": "1", "b": "2"}, {"a": "3", "b": ""}]
    assert as_table("", "x") == []
    with pytest.raises(UserError, match=r"^x: row 3 has 3 cells"):
        as_table("a,b\n1,2\n1,2,3\n", "x")
    with pytest.raises(UserError, match=r"^x: not a CSV table \(field larger"):
        parse_csv("a" * 200_000, "x")


def test_files(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + "{é: 1}".encode())
    assert read_yaml(tmp_path / "a") == {"é": 1}
    (tmp_path / "b").write_bytes(b"a,b\n\xff,1\n")
    for read in (read_yaml, read_table):
        with pytest.raises(UserError, match=r"/b: not a text file in UTF-8"):
            read(tmp_path / "b")
    with pytest.raises(UserError, match=r"/b: more than 3 bytes"):
        read_bytes(tmp_path / "b", 3)
    assert len(read_bytes(tmp_path / "b", 8)) == len(read_bytes(tmp_path / "b", None)) == 8
    with pytest.raises(UserError, match=r"/c: no such file"):
        read_json(tmp_path / "c")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path)
    with pytest.raises(UserError, match="/dev/zero: more than"):
        read_json("/dev/zero", 1000)
