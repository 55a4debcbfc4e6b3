"""Names from anywhere are drawn as they are or, where no font has a character, as an escape."""

import warnings

import numpy as np
import pytest
from PIL import Image

from sgformer.core.names import printable
from sgformer.viz import style
from sgformer.viz.confusion import draw_confusion
from sgformer.viz.detection import Instances, overlay
from sgformer.viz.sheets import draw_prediction
from sgformer.viz.significance import write_index

pytest.importorskip("matplotlib")
NAMES = ["$", "$$", "US$5_$10", "a|b", "bell\x07", "two\nlines", "Ω ж", "\udbff\udfff", "raw\udcff", "<b>", "100 %"]


@pytest.fixture
def drawn(monkeypatch):
    """The texts of every figure as they are drawn."""
    from matplotlib.text import Text

    texts: list[str] = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, *args, **more: (texts.append(self.get_text()), draw(self, *args))[1])
    return texts


def test_names_in_figures(tmp_path, drawn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing is a warning
        draw_confusion(np.eye(len(NAMES), dtype=int), NAMES, tmp_path / "c.png")
        draw_prediction(np.zeros((8, 8, 3), np.uint8), [(n, 0.1) for n in NAMES], tmp_path / "p.png", "menu $5_$10.png")
    expected = {"$", "$$", "US$5_$10", "a|b", "bell\\x07", "two\nlines", "Ω ж", "raw\\xff", "<b>", "menu $5_$10.png"}
    assert expected <= set(drawn)


def test_a_font_that_has_the_characters_is_taken_and_what_none_has_is_escaped(tmp_path, drawn, monkeypatch):
    """As if DejaVu lacked Greek, and only another installed font had it; no font has the last letter."""
    known, lacking = style._characters, set("Ωж")
    monkeypatch.setattr(
        style, "_characters", lambda font: known(font) - (lacking if "DejaVuSans.ttf" in font else set())
    )
    fonts, absent = style.fonts_for({"Ω", "\U000f1234"})
    assert len(fonts) == 1 and "DejaVuSans.ttf" not in fonts[0] and "Ω" in known(fonts[0])
    assert absent == {"\U000f1234"}
    draw_confusion(np.eye(2, dtype=int), ["Ω", "\U000f1234"], tmp_path / "c.png")
    assert {"Ω", "\\U000f1234"} <= set(drawn)


def test_names_on_detections():
    boxes = np.array([[5.0, 20.0, 60.0, 60.0]] * len(NAMES))
    image = np.full((100, 300, 3), 90, np.uint8)
    pictures = [overlay(image, Instances(boxes[:1], np.array([i])), NAMES) for i in range(len(NAMES))]
    assert len({picture.tobytes() for picture in pictures}) == len(NAMES)  # each has its own label
    assert style.label_font("raw\udcff", 12)[1] == "raw\\xff" and style.label_font("bell\x07", 12)[1] == "bell\\x07"
    assert style.label_font("Ωж", 12)[1] == "Ωж" and style.label_font("\U000f1234", 12)[1] == "\\U000f1234"


def test_the_index_escapes_names(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    text = write_index(tmp_path, [("<script>\udcff.png & co", "0.png")], "<run>").read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;\\udcff.png &amp; co" in text and "<h1>&lt;run&gt;</h1>" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31m", "\\x1b[31m"),
        ("raw\udcff", "raw\\xff"),
        ("ü 猫 $", "ü 猫 $"),
        ("\u2028", "\\u2028"),
    ],
)
def test_one_line_of_any_name(text, shown):
    assert printable(text) == shown
