"""What makes two data sets the same: classes, names, truths, their order; not their place or how accents are coded."""

import gzip
import unicodedata

import pytest
from photos import make_photos

from sgformer.core.errors import UserError
from sgformer.core.names import quoted
from sgformer.data.identity import Contents, class_differences, read_contents, write_contents
from sgformer.data.imagefolder import scan

ADDED = "1 image added (ant/0.png)"
ONE = Contents(("ant", "bee"), (("ant/0.png", "ant"), ("bee/0.png", "bee")))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (ONE, []),
        (Contents(ONE.classes, (*ONE.entries, ("bee/1.png", "bee"))), ["1 image added (bee/1.png)"]),
        (Contents(ONE.classes, ONE.entries[:1]), ["1 image removed (bee/0.png)"]),
        (Contents(ONE.classes, ONE.entries[::-1]), ["the images are in another order"]),
        (
            Contents(ONE.classes, (ONE.entries[0], ONE.entries[0])),
            ["1 image added (ant/0.png)", "1 image removed (bee/0.png)"],
        ),
        (Contents(ONE.classes, (ONE.entries[0], ("bee/0.png", "ant"))), ["annotations of 1 image changed (bee/0.png)"]),
        (Contents(("bee", "ant"), ONE.entries), ["the classes are in another order: bee, ant instead of ant, bee"]),
        (Contents(("ant",), ONE.entries), ["class bee is gone"]),
        (Contents(("ant", "bee", "cat", "dog"), ()), ["classes cat, dog are new"]),
    ],
)
def test_differences(now, said):
    assert ONE.differences(now) == said


def test_accents_and_blanks_at_the_ends_do_not_make_another_name():
    composed, decomposed = (unicodedata.normalize(form, "Hündin") for form in ("NFC", "NFD"))
    assert composed != decomposed and class_differences([composed], [f"{decomposed} "]) == []
    assert class_differences(["a  b"], ["a b"]) == ["class a  b is gone", "class a b is new"]
    assert quoted([composed, f"{composed} ", decomposed, "a\nb"]) == r"Hündin, 'H\xfcndin ', 'Hu\u0308ndin', 'a\nb'"


def test_a_record_is_read_back(tmp_path):
    splits = {"train": Contents.of(scan(make_photos(tmp_path / "photos"))), "val": ONE}
    splits["odd"] = Contents(("x",), (("not utf-8 \udcff.png", "x"),))
    write_contents(tmp_path / "data.json.gz", splits)
    assert read_contents(tmp_path / "data.json.gz") == splits
    assert read_contents(tmp_path / "none.json.gz") is None


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"train": 1, "val": 1}', "[" * 100_000, '{"train": {"classes": [], "images": []}}'),
        '{"train": {"classes": ["a"], "images": [["x"]]}, "val": {"classes": [], "images": []}}',
        '{"train": {"classes": [1], "images": []}, "val": {"classes": [], "images": []}}',
    ],
)
def test_a_damaged_record_is_named(tmp_path, content):
    for data in (content.encode(), gzip.compress(content.encode()), gzip.compress(content.encode())[:-9]):
        (tmp_path / "data.json.gz").write_bytes(data)
        with pytest.raises(UserError, match=r"data\.json\.gz: damaged"):
            read_contents(tmp_path / "data.json.gz")
