"""The shared style of all figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from sgformer.core.errors import UserError, require
from sgformer.core.files import replacing
from sgformer.core.names import escaped

INK = "#22262b"
FAINT = "#d9dde2"
COLOURS = ("#1f6feb", "#d1622b", "#2a9d63", "#8250df", "#b3872c")
SEQUENTIAL = "Blues"

SETTINGS = {
    "figure.facecolor": "white",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "text.parse_math": False,  # names may hold dollar signs
    "text.usetex": False,  # whatever the user's matplotlibrc says: names are no programs for TeX
}


@contextmanager
def figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """Yield a matplotlib figure, written to `path` as a PNG when the block ends; leaves global state untouched.

    Args:
        path: the PNG to write.
        width, height: in inches.
    """
    matplotlib = require("matplotlib", extra="train")
    figures = require("matplotlib.figure", extra="train")
    with matplotlib.rc_context(SETTINGS):
        fig = figures.Figure(figsize=(width, height), layout="constrained")  # uses the Agg canvas: no display needed
        yield fig
        _write_any_script(fig)
        with replacing(path) as unfinished:
            fig.savefig(unfinished, dpi=130, format="png")


# -- names in any script ----------------------------------------------------------------------------------------------


def _write_any_script(fig: Any) -> None:
    """Give the texts of a figure fonts that have their characters, and escape those that no font has."""
    from matplotlib import font_manager, rcParams
    from matplotlib.text import Text
    from matplotlib.ticker import FixedLocator

    texts = fig.findobj(Text)
    first = font_manager.findfont(font_manager.FontProperties())
    wanted = {c for text in texts for c in text.get_text() if c != "\n"} - _characters(first)
    if not wanted:
        return
    fonts, absent = fonts_for(wanted)
    families = [*rcParams["font.family"], *(font_manager.get_font(font).family_name for font in fonts)]
    rcParams["font.family"] = families
    for axes in fig.findobj(lambda artist: hasattr(artist, "xaxis")):
        for axis in (axes.xaxis, axes.yaxis):  # a formatter would write the names again
            if isinstance(axis.get_major_locator(), FixedLocator):
                axis.set_ticklabels([_escape(text.get_text(), absent) for text in axis.get_majorticklabels()])
    for text in fig.findobj(Text):
        text.set_fontfamily(families)
        text.set_text(_escape(text.get_text(), absent))


def fonts_for(characters: Iterable[str]) -> tuple[list[str], set[str]]:
    """Files of installed fonts that together have the characters, as few as possible; and those that none has."""
    from matplotlib import font_manager

    left, chosen = set(characters), []
    known = font_manager.fontManager.ttflist
    files = [font_manager.findfont("DejaVu Sans"), *(font.fname for font in known if "LastResort" not in font.fname)]
    while left and files:
        best = max(files, key=lambda file: len(left & _characters(file)))
        found = left & _characters(best)
        if not found:
            break
        chosen.append(best)
        left -= found
    return chosen, left


@cache
def _characters(font: str) -> frozenset[str]:
    """The characters that a font file has; none if it cannot be read."""
    from matplotlib.font_manager import get_font

    with suppress(RuntimeError, OSError):
        return frozenset(map(chr, get_font(font).get_charmap()))
    return frozenset()


def _escape(text: str, characters: set[str]) -> str:
    return "".join(escaped(c) if c in characters else c for c in text)


def label_font(text: str, size: int) -> tuple[Any, str]:
    """A font of Pillow that has a label's characters, and the label, with escapes for those that the font lacks."""
    from PIL import ImageFont

    wanted = {c for c in text if not (c.isprintable() and c <= "\u017f")}  # what Pillow's own font has
    if not wanted:
        return ImageFont.load_default(size), text
    fonts: list[str] = []
    with suppress(UserError):  # exported files are run without it
        require("matplotlib", extra="train")
        fonts, _ = fonts_for(c for c in wanted if c.isprintable())
    if not fonts:
        return ImageFont.load_default(size), _escape(text, wanted)
    return ImageFont.truetype(fonts[0], size), _escape(text, set(text) - _characters(fonts[0]))
