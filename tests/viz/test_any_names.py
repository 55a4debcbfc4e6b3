"""Names from anywhere are drawn as they are or, where no font has a character, as an escape."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from sgformer.core.names import printable
from sgformer.models.create import create_model
from sgformer.tasks.api import explainer_for
from sgformer.viz import (
    ablation,
    bench,
    confusion,
    curves,
    detection,
    evolution,
    segmentation,
    sheets,
    significance,
    style,
)
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


MATHS = ["$\\frac{$", "$x^2$", "\\input{x} $$ \\write18", "$\\undefined$", "a_$b$"]


def every_drawing(out):
    """Each function that draws names, with names that would be formulas, by its name."""
    n, noise = len(MATHS), np.random.default_rng(0)
    image = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    labels = np.arange(48 * 64).reshape(48, 64) % n
    boxes = np.array([[4.0, 5.0, 30.0, 40.0]] * n)
    objects = detection.Instances(boxes, np.arange(n), np.full(n, 0.9))
    bench_points = [
        {"label": name, "gmacs": 1.0, "images_per_s": 2.0 + i, "size": 32 * (1 + j), "seconds": 1.0 + j, "memory": 9}
        for i, name in enumerate(MATHS)
        for j in range(2)
    ]
    sizes = [{"network": m, "way": MATHS[1], "size": 32 * j, "ms": 1.0 * j} for m in MATHS for j in (1, 2)]
    grown = [{MATHS[1]: 1, "rank_correlation": 0.5}, {MATHS[1]: 2, "rank_correlation": 0.6}]
    row = {"block": "1.1", "energy_inside": 0.4, "area": 0.2, "shuffled": 0.2, "p": 0.1}
    records = [(MATHS[0], {"1": noise.random((8, 8))}), (MATHS[1], {"1": noise.random((8, 8))})]
    explained = explainer_for(create_model("sgformer_n", num_classes=n, img_size=32).eval()).explain(
        torch.zeros(3, 32, 32)
    )
    table = out.with_suffix(".csv")
    table.write_text(f"epoch,step,lr,train_loss,{MATHS[1]}\n1,1,0.1,1,0.5\n2,2,0.1,1,0.6\n")
    example = detection.Example(image, objects, objects, MATHS[0])
    return {
        "ablation.draw_ablation": lambda: ablation.draw_ablation([(m, [1.0, 2.0]) for m in MATHS], out, MATHS[0]),
        "ablation.draw_runs": lambda: ablation.draw_runs([(m, [(1, 2.0), (2, 3.0)]) for m in MATHS], out, MATHS[0]),
        "bench.draw_growth": lambda: bench.draw_growth(bench_points, MATHS[0], out),
        "bench.draw_sizes": lambda: bench.draw_sizes({MATHS[0]: sizes}, out),
        "bench.draw_throughput": lambda: bench.draw_throughput(bench_points, MATHS[0], out),
        "confusion.draw_confusion": lambda: draw_confusion(np.eye(n, dtype=int), MATHS, out, MATHS[0]),
        "curves.draw_curves": lambda: curves.draw_curves(table, out, (MATHS[1],)),
        "detection.draw_detections": lambda: detection.draw_detections(image, objects, MATHS, out),
        "detection.draw_examples": lambda: detection.draw_examples([example], [example], MATHS, out),
        "detection.draw_precision_recall": lambda: detection.draw_precision_recall(
            {"box": noise.random((n, 101))}, MATHS, out
        ),
        "detection.draw_training_images": lambda: detection.draw_training_images([image], [objects], MATHS, out),
        "evolution.draw_animation": lambda: evolution.draw_animation(image, records, out),
        "evolution.draw_growth": lambda: evolution.draw_growth(grown, out, MATHS[1]),
        "evolution.draw_localization": lambda: evolution.draw_localization([row], out),
        "evolution.draw_strip": lambda: evolution.draw_strip(image, records, out),
        "segmentation.draw_comparison": lambda: segmentation.draw_comparison(
            [image / 255], [labels], [labels], MATHS, out, MATHS[:1]
        ),
        "segmentation.draw_overlay": lambda: segmentation.draw_overlay(image, labels, MATHS, out, MATHS[0]),
        "segmentation.draw_training_batch": lambda: segmentation.draw_training_batch(
            image[None] / 255, labels[None], MATHS, out
        ),
        "sheets.draw_batch": lambda: sheets.draw_batch(image[None] / 255, np.eye(n)[:1], MATHS, out),
        "sheets.draw_prediction": lambda: draw_prediction(image, [(m, 0.2) for m in MATHS], out, MATHS[0]),
        "significance.draw_explanation": lambda: significance.draw_explanation(
            dataclasses.replace(explained, title="\n".join(MATHS)), out
        ),
    }


def test_no_drawing_reads_names_as_mathematics(tmp_path, monkeypatch):
    """Not even if the user's settings leave all texts to TeX."""
    import matplotlib
    from matplotlib.mathtext import MathTextParser
    from matplotlib.texmanager import TexManager

    def refuse(self, text, *_, **__):
        raise AssertionError(f"read as a formula: {text}")

    monkeypatch.setattr(MathTextParser, "parse", refuse)
    for method in ("make_tex", "get_text_width_height_descent"):
        monkeypatch.setattr(TexManager, method, classmethod(refuse))
    drawings = every_drawing(tmp_path / "drawn.png")
    rooms = (ablation, bench, confusion, curves, detection, evolution, segmentation, sheets, significance)
    functions = {f"{m.__name__.rpartition('.')[2]}.{name}" for m in rooms for name in vars(m) if name[:5] == "draw_"}
    assert set(drawings) == functions
    for name, draw in drawings.items():
        (tmp_path / "drawn.png").unlink(missing_ok=True)
        with matplotlib.rc_context({"text.usetex": True, "text.parse_math": True}):
            draw()
        assert (tmp_path / "drawn.png").stat().st_size > 100, name


def test_the_index_escapes_names(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    text = write_index(tmp_path, [("<script>\udcff.png\x1b & co", "0.png")], "<run>\x9b").read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;\\xff.png\\x1b &amp; co" in text
    assert "<h1>&lt;run&gt;\\x9b</h1>" in text and all(line.isprintable() for line in text.split("\n"))


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
