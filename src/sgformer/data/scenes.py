"""The embedded data set: cluttered scenes composed from a seed, with real pixels from pip packages.

Handwritten digits (scikit-learn's `load_digits`) are placed on photographs and textures (from scikit-image's and
scikit-learn's wheels), at an eighth to most of the frame, among distractor strokes, with varying colour and lighting.
One generator writes three standard layouts: ImageNet (one object per image), COCO (boxes and visible masks) and ADE20K
(label maps). Nothing is downloaded.

Train and val share no sprite and no photograph. The digits are the test set of UCI's "Optical Recognition of
Handwritten Digits", by 13 writers. The file does not record the writers, but its order separates forms: the labels
repeat a sequence of 130 digits 14 times (with a few missing), as if every writer had copied the same printed form.
`DIGIT_FORMS` holds the start of each copy. The last three forms are val, the others train; no form is split. As there
are 14 forms by 13 writers, one writer may be in both.
"""

from __future__ import annotations

import colorsys
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter

from sgformer.core.errors import UserError, require
from sgformer.core.parse import read_json
from sgformer.core.processes import end_with_parent
from sgformer.core.progress import track
from sgformer.data.image import read_image
from sgformer.data.store import appearing, new_folder

#: Start of each copied form in `load_digits()`, and the end.
DIGIT_FORMS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
#: Number of forms, from the end, that are val.
VAL_FORMS = 3

#: Photographs and textures by split: `package/path inside it`. Two views of one subject must be in the same split.
PHOTOGRAPHS = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/camera.png",
        "skimage/data/coffee.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/ihc.png",
        "skimage/data/coins.png",
        "skimage/data/brick.png",
        "skimage/data/grass.png",
        "sklearn/datasets/images/china.jpg",
    ),
    "val": (
        "skimage/data/chelsea.png",
        "skimage/data/rocket.jpg",
        "skimage/data/retina.jpg",
        "skimage/data/gravel.png",
        "skimage/data/moon.png",
        "sklearn/datasets/images/flower.jpg",
    ),
}

# fmt: off
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)
# fmt: on

#: Keypoints of an object: of the upright one's ink, what is farthest towards each corner.
ENDS = ("left_top", "right_top", "right_bottom", "left_bottom")
TOWARDS = ((-1, -1), (1, -1), (1, 1), (-1, 1))

OUTLINE = ((1, 2), (2, 3), (3, 4), (4, 1))

Layout = Literal["imagenet", "coco", "ade20k"]
SPLITS = ("train", "val")
#: Objects in a scene of the coco and ade20k layouts: 1 to this many.
MAX_OBJECTS = 6
#: Pixels of a sprite above this are its ink, about where its matte is half opaque; of a photograph.
INK, INK_SHADED = 115, 36
#: Minimum number of visible pixels of an object.
MIN_PIXELS = 6


class Sprites(NamedTuple):
    """The foreground: `images` (N, h, w) uint8, 0 where transparent; `labels` (N,) class indices.

    `shaded`: the values also give the brightness inside the shape (photographs), not only its opacity.
    """

    images: np.ndarray
    labels: np.ndarray
    shaded: bool


class Instance(NamedTuple):
    """An object of a scene: class index, visible mask (H, W) bool, whether another object occludes it in part, and its
    `ENDS` (4, 2), x and y from the corner of the first pixel."""

    label: int
    mask: np.ndarray
    occluded: bool
    ends: np.ndarray


@dataclass(frozen=True)
class Sources:
    """The material for the scenes of one split."""

    classes: tuple[str, ...]
    sprites: Sprites
    photographs: dict[str, Image.Image]


def make_scenes(
    out: str | os.PathLike,
    train: int = 4000,
    val: int = 1000,
    image_size: int = 96,
    seed: int = 0,
    layout: Layout = "imagenet",
    sprites: str | None = None,
    workers: int = 0,
) -> Path:
    """Compose scenes and write them in a standard layout.

    Scene `i` of a split depends on (seed, split, i, image size) and, for the number of objects, on the layout. The
    files are byte-identical for any number of workers, given the same versions of NumPy, Pillow, scikit-image and
    scikit-learn, which `scenes.json` records.

    Layouts:
        imagenet: `{train,val}/CLASS/000000.jpg`, one object per image, classes round-robin.
        coco: `{train,val}2017/000000000001.jpg`, `annotations/instances_{train,val}2017.json`, 1 to 6 objects that may
            occlude each other. Boxes, areas and masks are of the visible parts; a mask is a list of polygons, or
            uncompressed RLE if it is partly occluded or has a hole. Keypoints are where the upright object reaches
            farthest towards each corner, turned with it; those that another object covers are hidden ones.
        ade20k: `images/{training,validation}/00000001.jpg`, `annotations/{training,validation}/00000001.png` (label
            maps, 8-bit: 0 = background, 1 to 10 = classes), `classes.txt`; the same scenes as coco.

    Args:
        out: folder to create; it must not exist, or be empty. It appears complete, at the end.
        train: number of training scenes.
        val: number of validation scenes.
        image_size: side of the square images in pixels.
        seed: for all random numbers.
        layout: `"imagenet"`, `"coco"` or `"ade20k"`.
        sprites: None for handwritten digits, or `"fashion-mnist:DIR"` for the IDX files in DIR.
        workers: processes; 0 composes in this process.

    Returns:
        The path of the folder.

    Raises:
        UserError: `out` is not empty, a value is out of range, or a package or file is missing.
    """
    out = Path(out)
    counts = {"train": train, "val": val}
    if layout not in _WRITERS:
        raise UserError(f"layout must be one of {', '.join(_WRITERS)}, got {layout!r}")
    if not 32 <= image_size <= 1024:
        raise UserError(f"image size must be 32 to 1024 pixels, got {image_size}")
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    if workers < 0:
        raise UserError(f"workers must be 0 or more, got {workers}")
    for split, count in counts.items():
        if count < (least := 10 if layout == "imagenet" else 1):
            raise UserError(f"{split} must be {least} scenes or more in the {layout} layout, got {count}")
    out = new_folder(out)

    sources = {split: load_sources(split, sprites) for split in SPLITS}
    with appearing(out) as part:
        for split, count in counts.items():
            _make_folders(part, layout, split, sources[split].classes)
            write = partial(_write_scene, part, layout, split, image_size, seed)
            scenes = track(_map(write, count, sources[split], sprites, split, workers), count, f"composing {split}")
            annotations = [annotation for annotation in scenes if annotation is not None]
            if layout == "coco":
                _write_json(
                    part / f"annotations/instances_{split}2017.json",
                    _coco_json(sources[split].classes, count, image_size, annotations),
                )
        if layout == "ade20k":
            lines = ["Idx\tName", *(f"{i}\t{name}" for i, name in enumerate(sources["train"].classes, 1))]
            (part / "classes.txt").write_text("\n".join(lines) + "\n")
        _write_json(part / "scenes.json", _provenance(sources, counts, image_size, seed, layout, sprites), indent=2)
    return out


def load_sources(split: str, sprites: str | None = None) -> Sources:
    """Load the sprites and photographs of a split, `"train"` or `"val"`; the splits are disjoint.

    Raises:
        UserError: scikit-image or scikit-learn is not installed, or the IDX files cannot be read.
    """
    photographs = {}
    for name in PHOTOGRAPHS[split]:
        package, _, path = name.partition("/")
        file = Path(str(require(package, "demo").__file__)).parent / path
        if file.is_file():  # the content of the wheels changes slowly; scenes.json lists the files used
            photographs[name] = read_image(file)
    if not photographs:
        raise UserError("none of the photographs is in the installed scikit-image and scikit-learn; try other versions")
    if sprites is None:
        digits = require("sklearn.datasets", "demo").load_digits()
        border = DIGIT_FORMS[-1 - VAL_FORMS]
        chosen = slice(0, border) if split == "train" else slice(border, None)
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        classes = tuple(str(digit) for digit in range(10))
        return Sources(classes, Sprites(images[chosen], digits.target[chosen], shaded=False), photographs)
    kind, _, folder = sprites.partition(":")
    if kind != "fashion-mnist" or not folder:
        raise UserError(f"sprites must be 'fashion-mnist:DIR' with the folder of the IDX files, got {sprites!r}")
    stem = {"train": "train", "val": "t10k"}[split]
    images = read_idx(_idx_file(folder, f"{stem}-images-idx3-ubyte"))
    labels = read_idx(_idx_file(folder, f"{stem}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.shape != images.shape[:1] or set(np.unique(labels)) != set(range(10)):
        raise UserError(
            f"{folder}: the {stem} files do not hold images of 10 classes and a label for each; "
            f"got shapes {images.shape} and {labels.shape}"
        )
    return Sources(FASHION_CLASSES, Sprites(images, labels, shaded=True), photographs)


MAX_IDX = 2**28  # bytes of an IDX file, unpacked; MNIST's have 47 million


# By hand: torchvision's reader raises a bare AssertionError on damaged files, and does not read gzip.
def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read an IDX file (the format of MNIST), optionally gzipped, as an array of the stored shape and dtype.

    Raises:
        UserError: the file is missing, damaged, or not an IDX file; names it.
    """
    types = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                data = file.read(MAX_IDX)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in types:
        raise UserError(f"{path}: not an IDX file")
    head = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:head]) if len(data) >= head else (-1,)
    dtype = np.dtype(types[data[2]])
    if len(data) - head != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: damaged IDX file: its header gives shape {shape}, but it holds {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=head).reshape(shape).astype(dtype.newbyteorder("="))


def _idx_file(folder: str, name: str) -> Path:
    for candidate in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{folder}: holds neither {name} nor {name}.gz")


# --- composing -------------------------------------------------------------------------------------------------------


def compose(
    rng: np.random.Generator, sources: Sources, size: int, label: int | None = None
) -> tuple[Image.Image, list[Instance]]:
    """Compose one scene.

    Background and objects use separate brightness ranges, so that every object stands out; everything else varies
    freely.

    Args:
        rng: the only source of random numbers.
        sources: sprites and photographs.
        size: side of the image in pixels.
        label: class of a single object; by default 1 to `MAX_OBJECTS` objects of random classes.

    Returns:
        The image (RGB, size x size) and its objects, from back to front.
    """
    width = rng.uniform(0.25, 0.55)  # of the background's brightness range
    gap = rng.uniform(0.18, 0.35)
    bright_ground = rng.random() < 0.5
    low = rng.uniform(width + gap, 1.0) - width if bright_ground else rng.uniform(0.0, 1.0 - width - gap)
    # The objects' brightness range, starting at the end closest to the background's.
    inner, outer = (low - gap, 0.0) if bright_ground else (low + width + gap, 1.0)

    canvas = _ground(rng, sources.photographs, size, low, width)
    _scribble(rng, canvas, low, width)
    scene = np.asarray(canvas, dtype=np.float32) / 255
    ground = scene.copy()

    count = 1 if label is not None else int(rng.integers(1, MAX_OBJECTS + 1))
    largest = 0.9 if count == 1 else min(0.9, 1.25 / math.sqrt(count))
    labels: list[int] = []
    full: list[np.ndarray] = []
    visible: list[np.ndarray] = []
    placed: list[np.ndarray] = []
    for _ in range(count):
        kind = label if label is not None else int(rng.integers(len(sources.classes)))
        for _attempt in range(8):
            alpha, shade, ends = _sprite(rng, sources.sprites, kind, size, rng.uniform(0.125, largest))
            mask = alpha > 0.5
            rim = _rim(alpha) if full else alpha
            if np.count_nonzero(mask) >= MIN_PIXELS and _readable(full, visible, mask, rim > 0.5):
                break
        else:
            continue
        if full:  # a rim of background around the object keeps similar colours apart
            scene += (rim * np.any(full, 0))[..., None] * (ground - scene)
        color = _color(rng, inner + (outer - inner) * rng.uniform(0, 0.8))
        paint = inner + (color - inner) * shade[..., None]
        scene += alpha[..., None] * (paint - scene)
        visible = [under & ~(rim > 0.5) for under in visible] + [mask]
        full.append(mask)
        placed.append(ends)
        labels.append(kind)

    scene *= _light(rng, size)
    scene += rng.normal(0.0, rng.uniform(0.0, 0.03), scene.shape).astype(np.float32)
    image = Image.fromarray(np.rint(scene.clip(0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6) * size / 96))
    objects = [
        Instance(kind, part, bool((part != mask).any()), ends)
        for kind, part, mask, ends in zip(labels, visible, full, placed, strict=True)
    ]
    return image, objects


def _readable(full: list[np.ndarray], visible: list[np.ndarray], mask: np.ndarray, hidden: np.ndarray) -> bool:
    """Whether the existing objects stay recognisable if a new object with this mask hides `hidden`."""
    return all(
        np.count_nonzero(under & ~hidden) >= max(MIN_PIXELS, 0.65 * np.count_nonzero(other))
        and _box_overlap(other, mask) <= 0.35
        for other, under in zip(full, visible, strict=True)
    )


def _rim(alpha: np.ndarray) -> np.ndarray:
    """A matte dilated by about 1 % of the frame, with a soft edge."""
    matte = Image.fromarray(np.rint(alpha * 255).astype(np.uint8))
    blurred = matte.filter(ImageFilter.GaussianBlur(max(0.8, 0.012 * len(alpha))))
    return (np.asarray(blurred, dtype=np.float32) * (3 / 255)).clip(0, 1)


def _ground(
    rng: np.random.Generator, photographs: dict[str, Image.Image], size: int, low: float, width: float
) -> Image.Image:
    """A random crop of a random photograph, tinted, with brightness compressed to [low, low + width]."""
    photograph = list(photographs.values())[rng.integers(len(photographs))]
    longest = min(photograph.size)
    side = math.exp(rng.uniform(math.log(min(longest, max(48, 0.8 * size))), math.log(longest)))
    left, top = (rng.uniform(0, extent - side) for extent in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side), 2.0)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tint = _color(rng, 0.5) - 0.5
    table = low + width * (np.arange(256) / 255)[:, None] + 0.4 * width * tint
    return crop.point(np.rint(table.clip(0, 1) * 255).astype(int).T.ravel().tolist())


def _scribble(rng: np.random.Generator, canvas: Image.Image, low: float, width: float) -> None:
    """Draw distractor strokes on the background, in its brightness range: long lines, arcs, waves."""
    size = canvas.width
    scale = 2  # supersampling, for smooth edges
    layer = Image.new("RGBA", (size * scale, size * scale))
    draw = ImageDraw.Draw(layer)
    for _ in range(rng.integers(1, 7)):
        color = (_color(rng, low + width * rng.uniform(0, 1)) * 255).astype(int).tolist()
        pen = max(1, round(size * scale * rng.uniform(0.01, 0.05)))
        x, y = rng.uniform(0, size * scale, 2).tolist()
        angle = rng.uniform(0, 2 * math.pi)
        reach = size * scale * rng.uniform(0.15, 0.5)
        kind = rng.integers(3)
        if kind == 0:  # a line from within the frame to beyond its border
            end = (x + 2 * size * scale * math.cos(angle), y + 2 * size * scale * math.sin(angle))
            draw.line([(x, y), end], (*color, 255), pen)
        elif kind == 1:  # at most a semicircle
            start = math.degrees(angle)
            draw.arc(
                (x - reach, y - reach, x + reach, y + reach), start, start + rng.uniform(40, 180), (*color, 255), pen
            )
        else:  # a wave with several bends
            along = np.linspace(-1, 1, 24)
            across = 0.25 * np.sin(along * rng.uniform(5, 9) + angle)
            points = np.stack(
                [
                    along * math.cos(angle) - across * math.sin(angle),
                    along * math.sin(angle) + across * math.cos(angle),
                ],
                1,
            ) * reach + (x, y)
            draw.line([tuple(point) for point in points.tolist()], (*color, 255), pen, "curve")
    layer = layer.reduce(scale)
    canvas.paste(layer.convert("RGB"), (0, 0), layer.getchannel("A"))


def _sprite(
    rng: np.random.Generator, sprites: Sprites, label: int, size: int, fraction: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place a random sprite of a class at a random position.

    Args:
        fraction: its height before rotation, as a fraction of the frame.

    Returns:
        Its soft matte and its brightness, both (size, size) float32 within [0, 1]; and its `ENDS`.
    """
    choices = np.flatnonzero(sprites.labels == label)
    pixels = sprites.images[choices[rng.integers(len(choices))]]
    rows, columns = pixels.shape
    high = fraction * size
    wide = high * columns / rows * rng.uniform(0.85, 1.15)
    angle, shear = math.radians(rng.uniform(-18, 18)), rng.uniform(-0.2, 0.2)

    # A transparent border of one sprite pixel lets the interpolation fade out.
    padded = Image.fromarray(np.pad(pixels, 1))
    target = (max(3, round(wide * (1 + 2 / columns))), max(3, round(high * (1 + 2 / rows))))
    enlarged = padded.resize(target, Image.Resampling.LANCZOS)

    matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ [[1, shear], [0, 1]]
    reach = np.abs(matrix) @ (wide / 2, high / 2)
    middle = [rng.uniform(half, size - half) if 2 * half < size else size / 2 for half in reach]
    inverse = np.linalg.inv(matrix)
    offset = np.array(target) / 2 - inverse @ middle
    laid = enlarged.transform(
        (size, size),
        Image.Transform.AFFINE,
        (*inverse[0], offset[0], *inverse[1], offset[1]),
        Image.Resampling.BICUBIC,
    )
    ink = np.argwhere(pixels > (INK_SHADED if sprites.shaded else INK))[:, ::-1]  # x, y
    reached = [ink @ way for way in TOWARDS]
    farthest = np.array([ink[reach == reach.max()].mean(0) for reach in reached]) + 1.5  # padded; the pixels' middles
    ends = (farthest * target / (columns + 2, rows + 2) - offset) @ matrix.T
    values = np.asarray(laid, dtype=np.float32) / 255
    if sprites.shaded:
        return _smoothstep(values, 0.03, 0.25), values, ends
    weight = rng.uniform(0.36, 0.54)  # ink threshold: thin or heavy strokes
    return _smoothstep(values, weight - 0.12, weight + 0.12), np.ones_like(values), ends


def _smoothstep(values: np.ndarray, low: float, high: float) -> np.ndarray:
    t = ((values - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def _color(rng: np.random.Generator, luminance: float) -> np.ndarray:
    """A random colour with a given luminance in [0, 1]: (3,) float32."""
    hue = np.array(colorsys.hsv_to_rgb(rng.random(), 1.0, 1.0))
    chroma = hue - hue @ (0.299, 0.587, 0.114)
    room = np.where(chroma > 0, 1 - luminance, luminance) / np.maximum(np.abs(chroma), 1e-6)
    return (luminance + rng.uniform(0.1, 0.95) * room.min() * chroma).astype(np.float32)


def _light(rng: np.random.Generator, size: int) -> np.ndarray:
    """Uneven lighting, a factor (size, size, 1): a smooth field, sometimes with the soft edge of a shadow."""
    coarse = Image.fromarray(rng.uniform(0.75, 1.1, (3, 3)).astype(np.float32))
    field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    if rng.random() < 0.3:
        angle = rng.uniform(0, 2 * math.pi)
        x = np.linspace(-1, 1, size, dtype=np.float32)
        across = x * math.cos(angle) + x[:, None] * math.sin(angle) - rng.uniform(-0.6, 0.6)
        field = field * (1 - rng.uniform(0.15, 0.4) * _smoothstep(across, -0.06, 0.06))
    return field[..., None]


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The bounding box of a mask: left, top, width, height in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def _box_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection of two masks' boxes over the smaller box."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = _box(a), _box(b)
    across = max(0, min(ax + aw, bx + bw) - max(ax, bx))
    down = max(0, min(ay + ah, by + bh) - max(ay, by))
    return across * down / min(aw * ah, bw * bh)


# --- writing ---------------------------------------------------------------------------------------------------------

_worker_sources: Sources


def _start_worker(split: str, sprites: str | None) -> None:
    global _worker_sources
    end_with_parent()
    _worker_sources = load_sources(split, sprites)


def _in_worker(write: partial, index: int) -> Any:
    return write(_worker_sources, index)


def _map(write: partial, count: int, sources: Sources, sprites: str | None, split: str, workers: int) -> Iterator[Any]:
    """`write(sources, index)` for every index, in order."""
    if workers == 0:
        yield from map(partial(write, sources), range(count))
        return
    with multiprocessing.Pool(workers, _start_worker, (split, sprites)) as pool:
        yield from pool.imap(partial(_in_worker, write), range(count), chunksize=16)


def _make_folders(root: Path, layout: Layout, split: str, classes: tuple[str, ...]) -> None:
    folders = {
        "imagenet": [f"{split}/{name}" for name in classes],
        "coco": [f"{split}2017", "annotations"],
        "ade20k": [f"{kind}/{_ADE_SPLITS[split]}" for kind in ("images", "annotations")],
    }
    for folder in folders[layout]:
        (root / folder).mkdir(parents=True, exist_ok=True)


_ADE_SPLITS = {"train": "training", "val": "validation"}


def _write_scene(root: Path, layout: Layout, split: str, size: int, seed: int, sources: Sources, index: int) -> Any:
    """Compose and write scene `index`; returns its entry for the layout's annotation file."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    label = index % len(sources.classes) if layout == "imagenet" else None
    image, objects = compose(rng, sources, size, label)
    return _WRITERS[layout](root, split, index, image, objects, sources.classes)


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, quality=95, subsampling=0)


def _write_imagenet(root: Path, split: str, index: int, image: Image.Image, objects: list[Instance], classes) -> None:
    _save(image, root / split / classes[objects[0].label] / f"{index:06d}.jpg")


def _write_coco(root: Path, split: str, index: int, image: Image.Image, objects: list[Instance], classes) -> list[dict]:
    _save(image, root / f"{split}2017" / f"{index + 1:012d}.jpg")
    return [
        {
            "image_id": index + 1,
            "category_id": instance.label + 1,
            "bbox": list(_box(instance.mask)),
            "area": int(instance.mask.sum()),
            "iscrowd": 0,
            "segmentation": segmentation(instance.mask, instance.occluded),
            **_keypoints(instance, objects[place + 1 :]),
        }
        for place, instance in enumerate(objects)
    ]


def _keypoints(instance: Instance, above: list[Instance]) -> dict[str, Any]:
    """The entries of an annotation for an object's ends; COCO counts pixels from the middle of the first one."""
    size, values = len(instance.mask), []
    for x, y in instance.ends.tolist():
        inside = 0 <= x < size and 0 <= y < size
        hidden = inside and any(other.mask[int(y), int(x)] for other in above)
        values += [round(x - 0.5, 2), round(y - 0.5, 2), 1 if hidden else 2] if inside else [0, 0, 0]
    return {"keypoints": values, "num_keypoints": sum(seen > 0 for seen in values[2::3])}


def _write_ade20k(root: Path, split: str, index: int, image: Image.Image, objects: list[Instance], classes) -> None:
    name = f"{_ADE_SPLITS[split]}/{index + 1:08d}"
    labels = np.zeros((image.height, image.width), np.uint8)
    for instance in objects:
        labels[instance.mask] = instance.label + 1
    _save(image, root / "images" / f"{name}.jpg")
    Image.fromarray(labels).save(root / "annotations" / f"{name}.png")


_WRITERS = {"imagenet": _write_imagenet, "coco": _write_coco, "ade20k": _write_ade20k}


def _coco_json(classes: tuple[str, ...], count: int, size: int, annotations: list[list[dict]]) -> dict:
    every = [annotation for scene in annotations for annotation in scene]
    return {
        "info": {"description": "sgformer scenes"},
        "licenses": [],
        "categories": [
            {"id": i, "name": name, "supercategory": "object", "keypoints": ENDS, "skeleton": OUTLINE}
            for i, name in enumerate(classes, 1)
        ],
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": size, "height": size} for i in range(1, count + 1)],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(every, 1)],
    }


# By hand: pycocotools encodes compressed RLE only and no polygons, and the demo extra does not include it.
def segmentation(mask: np.ndarray, occluded: bool = False) -> list[list[int]] | dict:
    """A mask (H, W) bool in COCO's format: polygons along pixel borders, or uncompressed RLE.

    RLE is used for partly occluded masks, and for masks with a hole, which polygons cannot represent.
    """
    polygons = None if occluded else _outlines(mask)
    if polygons is not None:
        return polygons
    flat = mask.T.ravel()  # COCO's RLE is column-major and starts with a run of zeros
    borders = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *borders, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def _outlines(mask: np.ndarray) -> list[list[int]] | None:
    """Outlines of a mask's 4-connected components as polygons [x0, y0, x1, y1, ...]; None if one has a hole."""
    padded = np.pad(mask, 1).astype(np.int8)
    down = padded[1:, :] - padded[:-1, :]  # +1: the mask starts below this edge, -1: it ends
    right = padded[:, 1:] - padded[:, :-1]
    follow: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Directed edges with the mask on their right-hand side (y down); coordinates are those of the unpadded mask.
    for (y, x), step in [((y, x - 1), down[y, x]) for y, x in np.argwhere(down).tolist()]:
        a, b = ((x, y), (x + 1, y)) if step > 0 else ((x + 1, y), (x, y))
        follow.setdefault(a, []).append(b)
    for (y, x), step in [((y - 1, x), right[y, x]) for y, x in np.argwhere(right).tolist()]:
        a, b = ((x, y + 1), (x, y)) if step > 0 else ((x, y), (x, y + 1))
        follow.setdefault(a, []).append(b)
    polygons = []
    while follow:
        start = here = next(iter(follow))
        points, before = [], None
        while True:
            ends = follow[here]
            # Where two components touch at a corner, turn right, so that each keeps its own outline.
            if len(ends) > 1 and before is not None:
                dx, dy = here[0] - before[0], here[1] - before[1]
                there = (here[0] - dy, here[1] + dx)
                ends.remove(there)
            else:
                there = ends.pop()
            if not ends:
                del follow[here]
            points.append(here)
            before, here = here, there
            if here == start:
                break
        corners = [
            p for i, p in enumerate(points) if (points[i - 1][0] == p[0]) != (p[0] == points[(i + 1) % len(points)][0])
        ]
        area = sum(corners[i - 1][0] * y - x * corners[i - 1][1] for i, (x, y) in enumerate(corners))
        if area < 0:
            return None
        polygons.append([value for point in corners for value in point])
    return polygons


def _provenance(sources, counts, size, seed, layout, sprites) -> dict:
    """The content of `scenes.json`: how to reproduce the scenes, and their material."""
    return {
        "generator": {"layout": layout, **counts, "image_size": size, "seed": seed, "sprites": sprites},
        "classes": list(sources["train"].classes),
        "versions": {
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "scikit-image": require("skimage", "demo").__version__,
            "scikit-learn": require("sklearn", "demo").__version__,
        },
        "splits": {
            split: {
                "sprites": len(source.sprites.images),
                "sprites_sha256": hashlib.sha256(source.sprites.images.tobytes()).hexdigest(),
                "photographs": {
                    name: hashlib.sha256(image.tobytes()).hexdigest() for name, image in source.photographs.items()
                },
            }
            for split, source in sources.items()
        },
    }


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n")


# --- where the objects are -------------------------------------------------------------------------------------------

#: A recomposed scene differs from its JPEG by compression only: maximum mean difference in grey levels.
MAX_DIFFERENCE = 6.0


def scene_objects(path: str | os.PathLike[str]) -> np.ndarray:
    """The object's pixels in a scene of the imagenet layout, (H, W) bool.

    This layout stores no masks; the scene is recomposed from `scenes.json` and compared with the file.

    Args:
        path: the image, `DATA/{train,val}/CLASS/000000.jpg`.

    Raises:
        UserError: the file is not such an image, or other package versions compose another scene.
    """
    path = Path(path)
    root, split = path.parents[2], path.parents[1].name
    try:
        generator = read_json(root / "scenes.json")["generator"]
        index, size, seed, sprites = (
            int(path.stem),
            int(generator["image_size"]),
            int(generator["seed"]),
            generator["sprites"],
        )
        if generator["layout"] != "imagenet" or split not in SPLITS:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a scene of `sgformer data scenes` in the imagenet layout") from None
    sources = _cached_sources(split, sprites)
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    image, (instance,) = compose(rng, sources, size, index % len(sources.classes))
    stored = np.asarray(read_image(path), dtype=np.float32)
    if stored.shape[:2] != (size, size) or np.abs(stored - np.asarray(image)).mean() > MAX_DIFFERENCE:
        raise UserError(f"{path}: differs when recomposed: made with other package versions (see {root}/scenes.json)")
    return instance.mask


_cached_sources = lru_cache(maxsize=2)(load_sources)
