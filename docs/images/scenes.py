"""Makes scenes.jpg: `python docs/images/scenes.py` (needs the `demo` extra)."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sgformer.data.scenes import compose, load_sources

SIDE, GAP, COLUMNS = 112, 4, 10
INKS = [(230, 25, 75), (60, 180, 75), (255, 200, 25), (70, 130, 240), (245, 130, 48),
        (145, 30, 180), (70, 220, 230), (240, 50, 230), (170, 220, 60), (250, 160, 160)]  # fmt: skip


def tiles():
    """Rows: one object (train, then val); several objects; the same with masks and boxes; their label maps."""
    train, val = load_sources("train"), load_sources("val")
    for row, sources in enumerate((train, val)):
        yield [compose(np.random.default_rng((row, i)), sources, SIDE, i)[0] for i in range(COLUMNS)]
    scenes = [compose(np.random.default_rng((2, i)), train, SIDE) for i in range(COLUMNS)]
    yield [image for image, _ in scenes]
    yield [outlined(image, things) for image, things in scenes]
    yield [labelled(things) for _, things in scenes]


def outlined(image, things):
    pixels = np.asarray(image).copy()
    for thing in things:
        pixels[thing.mask] = 0.3 * pixels[thing.mask] + 0.7 * np.array(INKS[thing.label])
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for thing in things:
        rows, columns = np.flatnonzero(thing.mask.any(1)), np.flatnonzero(thing.mask.any(0))
        draw.rectangle((columns[0] - 1, rows[0] - 1, columns[-1] + 1, rows[-1] + 1), outline=INKS[thing.label])
    return picture


def labelled(things):
    pixels = np.full((SIDE, SIDE, 3), 40, np.uint8)
    for thing in things:
        pixels[thing.mask] = INKS[thing.label]
    return Image.fromarray(pixels)


step = SIDE + GAP
sheet = Image.new("RGB", (COLUMNS * step - GAP, 5 * step - GAP), "white")
for row, images in enumerate(tiles()):
    for column, tile in enumerate(images):
        sheet.paste(tile, (column * step, row * step))
sheet.save(Path(__file__).with_suffix(".jpg"), quality=90, optimize=True)
