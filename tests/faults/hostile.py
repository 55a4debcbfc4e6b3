"""Bad and hostile input, and what has to become of it: accepted and right, or refused in one line that names the file.

`mutated_images`, `mutated_checkpoints`, ... yield (name, bytes) without end, the same for the same seed. `try_image`,
`try_weights`, ... give "accepted" or "refused" and raise on anything else.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import copy
import functools
import io
import json
import random
import re
import shutil
import socket
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image, features

sys.path.insert(0, str(Path(__file__).parent.parent))
import coco_scene
from photos import make_photos

import sgformer
from sgformer.app.session import _examples as examples_of
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.core.names import markdown, printable, without_login
from sgformer.core.terminal import say
from sgformer.data.ade20k import read_label_map
from sgformer.data.coco import CocoDataset, find_coco, ground_truth, read_coco
from sgformer.data.converting import convert
from sgformer.data.image import MAX_PIXELS, probe_image, read_image
from sgformer.data.sharding import index_shards, make_shards
from sgformer.data.shards import INDEX, Index
from sgformer.data.store import Store
from sgformer.models.released import load_released, to_released
from sgformer.tasks.detect.metrics import CocoMetric
from sgformer.tasks.registry import TASKS, get_task
from sgformer.training.config import make_config, read_yaml, refuse_remote

Inputs = Iterator[tuple[str, bytes]]


@contextlib.contextmanager
def within(mebibytes: int) -> Iterator[None]:
    """Inside, this process gets no more than so much memory more: what asks for it fails at once. On Linux."""
    try:
        import resource

        status = Path("/proc/self/status").read_text()
    except (ImportError, OSError):
        yield
        return
    used = 1024 * int(re.search(r"VmData:\s+(\d+)", status)[1])  # type: ignore[index]
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + (mebibytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def refused(path: str, call: Callable[[], Any]) -> str:
    """Run `call`; "refused" if it raises a UserError of one line that names the file, "accepted" if it returns."""
    try:
        call()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) <= 600, f"not a line: {text[:100]!r} ... {text[-400:]!r}"
        assert path in text, f"does not name {path}: {text}"
        return "refused"
    return "accepted"


# -- mutations of bytes -----------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite, insert, remove or repeat something."""
    if not data:
        return data
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        here, length = rng.randrange(len(result) or 1), rng.choice((1, 2, 4, 8, 64, 512))
        # Headers say what the rest means: half of the damage goes there.
        here = min(here, rng.randrange(256)) if rng.random() < 0.5 else here
        kind = rng.choice(("flip", "flip", "overwrite", "number", "insert", "remove", "repeat", "cut"))
        if kind == "flip" and result:
            result[here % len(result)] ^= 1 << rng.randrange(8)
        elif kind == "overwrite":
            result[here : here + length] = rng.randbytes(length)
        elif kind == "number":
            number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
            result[here : here + 4] = struct.pack(rng.choice("<>") + "I", number)
        elif kind == "insert":
            result[here:here] = rng.randbytes(length)
        elif kind == "remove":
            del result[here : here + length]
        elif kind == "repeat":
            result[here:here] = result[here : here + length]
        elif kind == "cut" and rng.random() < 0.3:
            del result[here:]
    return bytes(result)


# -- images -----------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_claiming(width: int, height: int, pixels: bytes = b"", depth: int = 8, color: int = 2) -> bytes:
    """A PNG with this header, and `pixels` as its compressed data, whatever they are."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = (header, b"IDAT" + pixels, b"IEND")
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb(width: int, height: int, depth: int = 8, color: int = 0) -> bytes:
    """A PNG of zeros that is small on the disk and large in memory."""
    channels = {0: 1, 2: 3, 6: 4}[color]
    packer, line = zlib.compressobj(9), bytes(1 + (width * channels * depth + 7) // 8)
    return png_claiming(width, height, b"".join([*(packer.compress(line) for _ in range(height)), packer.flush()]),
                        depth, color)  # fmt: skip


@functools.cache
def seeds() -> dict[str, bytes]:
    """Small whole images of every kind, by file name."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8))
    grey, sixteen = noise.convert("L"), Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    alpha = noise.convert("RGBA")
    alpha.putalpha(grey)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [grey.convert("RGB"), noise]}
    found = {
        "rgb.jpg": encoded(noise, "JPEG"),
        "grey.jpg": encoded(grey, "JPEG"),
        "cmyk.jpg": encoded(noise.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(noise, "JPEG", progressive=True),
        "turned.jpg": encoded(noise, "JPEG", exif=turned),
        **{f"{m}.png": encoded(noise.convert(m), "PNG") for m in ("1", "L", "P", "RGB")},
        "alpha.png": encoded(alpha, "PNG"),
        "grey_alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "colour_key.png": encoded(noise.convert("P"), "PNG", transparency=3),
        "sixteen.png": encoded(sixteen, "PNG"),
        "animated.png": encoded(noise, "PNG", **frames),
        "still.gif": encoded(noise, "GIF"),
        "animated.gif": encoded(noise, "GIF", **frames),
        "plain.bmp": encoded(noise, "BMP"),
        "plain.ppm": encoded(noise, "PPM"),
        "sixteen.pgm": encoded(sixteen, "PPM"),
        "sixteen.tif": encoded(sixteen, "TIFF"),
        "float.tif": encoded(Image.fromarray(np.linspace(-1, 2, 600, dtype=np.float32).reshape(20, 30)), "TIFF"),
        "cmyk.tif": encoded(noise.convert("CMYK"), "TIFF"),
        "turned.tif": encoded(noise, "TIFF", exif=turned),
        "palette.tif": encoded(noise.convert("P"), "TIFF"),
    }
    if features.check("libtiff"):
        for packing in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
            found[f"{packing}.tif"] = encoded(noise, "TIFF", compression=packing)
        found["fax.tif"] = encoded(noise.convert("1"), "TIFF", compression="group4")
    if features.check("webp"):
        found["lossy.webp"] = encoded(noise, "WEBP")
        found["lossless.webp"] = encoded(alpha, "WEBP", lossless=True)
        found["animated.webp"] = encoded(noise, "WEBP", **frames)
    if features.check("avif"):
        found["plain.avif"] = encoded(noise, "AVIF")
    return found


def special_images() -> Inputs:
    """What is not made by chance."""
    yield "empty.jpg", b""
    yield "text.png", b"not an image"
    for width, height in ((2**31 - 1, 2**31 - 1), (100_000, 100_000), (MAX_PIXELS, 2), (2**31 - 1, 1), (0, 5), (5, 0)):
        yield f"claims_{width}x{height}.png", png_claiming(width, height)
        yield f"claims_{width}x{height}.ppm", f"P6 {width} {height} 255\n".encode()
        yield f"claims_{width}x{height}.gif", b"GIF89a" + struct.pack("<HHBBB", width % 2**16, height % 2**16, 0, 0, 0)
        if min(width, height) > 0:
            tags = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8),
                    (279, 4, 1, 2**31 - 1))  # fmt: skip
            entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
            yield f"claims_{width}x{height}.tif", b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    yield "bomb_16_megapixels.png", bomb(4096, 4096)
    yield "bomb_text.png", png_text_bomb()
    for name, data in seeds().items():
        for other in (".jpg", ".png", ".tif", ".gif", ".webp", ".bmp"):
            yield name.replace(".", "_") + other, data  # under a wrong name


def png_text_bomb() -> bytes:
    """A small image whose comment unpacks to 64 MB."""
    whole = seeds()["RGB.png"]
    text = b"zTXtComment\0\0" + zlib.compress(bytes(2**26), 9)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return whole[:33] + chunk + whole[33:]


def mutated_images(seed: int = 0) -> Inputs:
    yield from special_images()
    rng, names = random.Random(seed), list(seeds())
    number = 0
    while True:
        name = rng.choice(names)
        data = mutate(seeds()[name], rng)
        if rng.random() < 0.05:  # the beginning of one, the end of another
            other = seeds()[rng.choice(names)]
            data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
        yield f"{number}_{name}", data
        number += 1


def try_image(name: str, data: bytes) -> str:
    def read() -> None:
        header = probe_image(data, name)
        image = read_image(data, name)
        assert image.mode == "RGB" and image.size == (header.width, header.height)
        assert image.width * image.height <= MAX_PIXELS

    return refused(name, read)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@functools.cache
def weights() -> tuple[bytes, bytes, dict[str, torch.Tensor]]:
    """A safetensors file, a released file, and the tensors in both."""
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=3, img_size=64)
    with tempfile.TemporaryDirectory() as folder:
        path = sgformer.save_model(model, Path(folder) / "w.safetensors", {"classes": ["a", "b", "c"]})
        ours = path.read_bytes()
    file = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": to_released(model)}, file)
    return ours, file.getvalue(), {name: value.clone() for name, value in model.state_dict().items()}


@functools.cache
def released_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes in a released checkpoint."""
    model = sgformer.create_model("sgformer_n", num_classes=3, img_size=64)
    return {name: tuple(value.shape) for name, value in to_released(model).items()}


def mutated_weights(seed: int = 0) -> Inputs:
    """Of both kinds in turn."""
    rng, number = random.Random(seed), 0
    while True:
        for ending, whole in zip((".safetensors", ".pth"), weights()[:2], strict=True):
            data = whole
            if rng.random() < 0.2:
                data = whole[: rng.randrange(len(whole))]
            elif ending == ".safetensors" and rng.random() < 0.6:  # inside the header
                length = 8 + int.from_bytes(whole[:8], "little")
                data = mutate(whole[:length], rng) + whole[length:]
            elif ending == ".pth" and rng.random() < 0.6:  # inside the pickle, or the archive's list of contents
                middle = 8192 if rng.random() < 0.5 else len(whole) - 20000
                data = whole[:middle] + mutate(whole[middle : middle + 20000], rng) + whole[middle + 20000 :]
                if middle == 8192:
                    data = mutate(whole[:20000], rng) + whole[20000:]
            else:
                data = mutate(whole, rng)
            yield f"{number}{ending}", data
        number += 1


def try_weights(name: str, data: bytes, folder: Path) -> str:
    """Accepted only if the model is the original to the bit: nothing is ever half loaded."""
    path = folder / name
    path.write_bytes(data)

    def load() -> None:
        model = sgformer.load_model(path) if path.suffix == ".safetensors" else load_released(path)
        expected = weights()[2]
        state = model.state_dict()
        assert state.keys() == expected.keys(), "another model"
        different = [key for key, value in state.items() if not torch.equal(value, expected[key])]
        assert not different, f"other weights: {different}"
        if path.suffix == ".safetensors":
            assert model.metadata == {"classes": ["a", "b", "c"]}, "other metadata"

    try:
        return refused(name, load)
    finally:
        path.unlink()


# -- annotations ------------------------------------------------------------------------------------------------------

JUNK = (
    *(None, True, -1, 0, 1.5, 1e308, -1e308, float("nan"), float("inf"), 2**63, 10**400),
    *("", "x", "3", "\0", "../../etc/passwd", "/etc/passwd", "C:\\x.png", "\ud800", "a" * 5000),
    *([], [[]], {}, [1], [None], [[1, 1, 5, 1, 5, 5]], [[1, 2, 3]], {"size": [1, 1], "counts": [1]}),
    *({"size": [48, 64], "counts": counts} for counts in ("0000", [3072], [2**62, 7])),
)


@functools.cache
def annotations() -> dict[str, Any]:
    rle = {"size": [48, 64], "counts": [10, 5, 48 * 64 - 15]}
    packed = {"size": [48, 64], "counts": "PQ3"}
    boxes = [coco_scene.pointed(10, 3, [4, 5, 20, 10]), coco_scene.pointed(20, 7, [30, 20, 10, 10], segmentation=rle)]
    return coco_scene.pointed_content([*boxes, coco_scene.thing(10, 7, [0, 0, 64, 48], segmentation=packed, iscrowd=1)])


def mutated_annotations(seed: int = 0) -> Inputs:
    rng, number = random.Random(seed), 0
    while True:
        if rng.random() < 0.2:
            data = mutate(json.dumps(annotations()).encode(), rng)
        else:
            content = json.loads(json.dumps(annotations()))
            for _ in range(rng.choice((1, 1, 2, 3))):
                spoil(content, rng)
            data = json.dumps(content).encode()
        yield f"{number}.json", data
        number += 1


def spoil(value: Any, rng: random.Random, junk: tuple[Any, ...] | None = None) -> None:
    """Replace, remove, double or add something somewhere in nested lists and dicts."""
    junk = JUNK if junk is None else junk
    while isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.75:
            value = value[key]
            continue
        what = rng.choice(("replace", "replace", "replace", "remove", "double", "add"))
        if what == "remove":
            del value[key]
        elif what == "double" and isinstance(value, list):
            value.append(value[key])
        elif what == "add" and isinstance(value, dict):
            value[rng.choice(("iscrowd", "ignore", "extra", "segmentation"))] = copy.deepcopy(rng.choice(junk))
        else:
            value[key] = copy.deepcopy(rng.choice(junk))
        return


def coco_folder(folder: Path) -> Path:
    """Images for `annotations`, written once."""
    if not (folder / "train").is_dir():
        coco_scene.write_coco(folder, annotations())
    return folder


def try_annotations(name: str, data: bytes, folder: Path) -> str:
    path = coco_folder(folder) / name
    path.write_bytes(data)

    def read() -> None:
        check(False)
        if check(None).skeleton:
            check(True)

    def check(keypoints: bool | None) -> Any:
        listing = read_coco(path, folder / "train", check_files=False, keypoints=keypoints)
        inside = (folder / "train").resolve()
        assert all(listing.path(i).resolve().is_relative_to(inside) for i in range(len(listing))), "leads out"
        dataset = CocoDataset(listing, bad_images="skip")
        for i in range(len(dataset)):
            sample = dataset[i]
            if sample.skipped is None:
                boxes = sample.target["boxes"]
                assert boxes.isfinite().all() and len(boxes) == len(sample.target["labels"])
                assert (sample.target["labels"] <= len(listing.classes)).all()
                assert listing.skeleton is None or sample.target["points"].isfinite().all()
        truth = ground_truth(listing)
        if keypoints:
            CocoMetric(truth, listing.classes, listing.own_ids, False, [0.1] * len(listing.skeleton.names)).evaluate(
                [], []
            )
        return listing

    try:
        return refused(name, read)
    finally:
        path.unlink()


# -- files of other tools ---------------------------------------------------------------------------------------------


@functools.cache
def tool_files() -> dict[str, tuple[str, str, dict[str, bytes]]]:
    """Format -> the layout it is written as, the file to damage, and the whole data set by path."""
    picture, palette = seeds()["RGB.png"], seeds()["P.png"]
    voc = """<?xml version="1.0"?><annotation><filename>a.png</filename><object><name>cat</name><difficult>0</difficult>
        <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>20</xmax><ymax>15</ymax></bndbox></object></annotation>"""
    polygon = {"label": "cat", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon", "group_id": 1}
    mask = {
        "label": "cat",
        "points": [[1, 1], [9, 9]],
        "shape_type": "mask",
        "mask": base64.b64encode(palette).decode(),
    }
    labelme = {"version": "5", "flags": {}, "shapes": [polygon, mask], "imagePath": "a.png", "imageData": None}
    square = {"shape_attributes": {"name": "rect", "x": 1, "y": 1, "width": 9, "height": 9}}
    star = {"shape_attributes": {"name": "polygon", "all_points_x": [1, 9, 9], "all_points_y": [1, 1, 9]}}
    regions = [{**shape, "region_attributes": {"name": "cat"}} for shape in (square, star)]
    via = {"a.png9": {"filename": "a.png", "size": 9, "regions": regions, "file_attributes": {}}}
    yaml = b"path: .\ntrain: images/train\nval: images/train\nnames: {0: cat, 1: dog}\nnc: 2\n"
    table = b"ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf\na,x,/m/01,1,0.1,0.5,0.2,0.4,0\n"
    labels = b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.5 0.1 0.5 0.5\n"
    yolo = {"images/train/a.png": picture, "labels/train/a.txt": labels, "data.yaml": yaml}
    told = [{"image": "x/a.png", "labels": [{"class": "cat", "probability": 0.9}]}]
    colours = b"name,r,g,b\nground,0,0,0\ncat,128,0,0\n"
    grey = encoded(Image.fromarray(np.zeros((24, 31), np.uint8)).convert("RGB"), "PNG")
    painted = {"images/a.png": picture, "masks/a.png": grey, "class_dict.csv": colours}
    return {
        "voc": ("coco", "a.xml", {"a.png": picture, "a.xml": voc.encode()}),
        "yolo labels": ("coco", "labels/train/a.txt", yolo),
        "yolo settings": ("coco", "data.yaml", yolo),
        "labelme": ("coco", "a.json", {"a.png": picture, "a.json": json.dumps(labelme).encode()}),
        "via": ("coco", "a.json", {"a.png": picture, "a.json": json.dumps(via).encode()}),
        "csv": ("imagenet", "train.csv", {"a.png": picture, "train.csv": b"file,label\na.png,cat\n"}),
        "openimages": ("coco", "train-annotations-bbox.csv", {"a.png": picture, "train-annotations-bbox.csv": table}),
        "predictions": ("imagenet", "told.json", {"a.png": picture, "told.json": json.dumps(told).encode()}),
        "colours table": ("ade20k", "class_dict.csv", painted),
        "colours mask": ("ade20k", "masks/a.png", painted),
    }


def mutated_tool_files(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(format, damaged file) of each format in turn."""
    rng = random.Random(seed)
    while True:
        for name, (_, file, whole) in tool_files().items():
            if file.endswith(".json") and rng.random() < 0.6:
                content = json.loads(whole[file])
                for _ in range(rng.choice((1, 1, 2))):
                    spoil(content, rng)
                yield name, json.dumps(content).encode()
            elif rng.random() < 0.4:  # a word for a word
                words = re.split(rb"([\s,:<>]+)", whole[file])
                words[rng.randrange(len(words))] = str(rng.choice(JUNK)).encode("utf-8", "replace")[:300]
                yield name, b"".join(words)
            else:
                yield name, mutate(whole[file], rng)


def try_tool_file(name: str, data: bytes, folder: Path) -> str:
    """Converted into a data set that opens, of images of the source alone, or refused without a trace."""
    layout, file, whole = tool_files()[name]
    root, out = Path(tempfile.mkdtemp(dir=folder)), folder / "converted"
    for path, content in {**whole, file: data}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)

    def read() -> None:
        single = name == "predictions"  # of one file; the others are folders
        convert(root / file if single else root, out, layout, name.partition(" ")[0])
        images = [path for path in out.rglob("*.png") if path.is_file() and "annotations" not in path.parts]
        assert images and all(path.read_bytes() == whole[next(iter(whole))] for path in images), "other images"
        for written in out.glob("annotations/*.json"):
            CocoDataset(read_coco(*find_coco(written, "train")))[0]

    try:
        outcome = refused(str(folder), read)
        assert outcome == "accepted" or not out.exists(), f"{name}: half written"
        return outcome
    finally:
        shutil.rmtree(root)
        shutil.rmtree(out, ignore_errors=True)


def mutated_label_maps(seed: int = 0) -> Inputs:
    rng, number = random.Random(seed), 0
    values = np.random.default_rng(0).integers(0, 5, (16, 20), dtype=np.uint8)
    whole = [
        encoded(Image.fromarray(values), "PNG"),
        encoded(Image.fromarray(values.astype(np.uint16)), "PNG"),
        encoded(Image.fromarray(values).convert("P"), "PNG"),
        encoded(Image.fromarray(values > 2), "PNG"),
        bytes(seeds()["RGB.png"]),
        bytes(seeds()["animated.png"]),
    ]
    while True:
        yield f"{number}.png", mutate(rng.choice(whole), rng)
        number += 1


def try_label_map(name: str, data: bytes, folder: Path) -> str:
    path = folder / name
    path.write_bytes(data)

    def read() -> None:
        values = read_label_map(path)
        assert values.ndim == 2 and values.min(initial=0) >= 0

    try:
        return refused(name, read)
    finally:
        path.unlink()


# -- shards -----------------------------------------------------------------------------------------------------------


@functools.cache
def packed() -> tuple[dict[str, bytes], list[bytes]]:
    """Files of a small data set in shards, by path; and the images' bytes."""
    images = [seeds()[name] for name in ("rgb.jpg", "L.png", "plain.bmp", "still.gif")]
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "photos"
        for split in ("train", "val"):
            for i, data in enumerate(images):
                path = source / split / ("ant", "bee")[i % 2] / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        out = make_shards(source, Path(work) / "shards")
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")}, images


def mutated_shards(seed: int = 0) -> Inputs:
    """Indexes and shards in turn: spoilt JSON, damaged bytes."""
    rng, number = random.Random(seed), 0
    index, shard = packed()[0][INDEX], packed()[0]["train/000000.tar"]
    while True:
        if rng.random() < 0.3:
            data = mutate(index, rng)
        else:
            content = json.loads(index)
            for _ in range(rng.choice((1, 1, 2, 3))):
                spoil(content, rng)
            data = json.dumps(content).encode()
        yield f"{number}.json", data
        yield f"{number}.tar", mutate(shard, rng) if rng.random() < 0.7 else shard[: rng.randrange(len(shard))]
        number += 1


def try_shards(name: str, data: bytes, folder: Path) -> str:
    """With an index: every image is the original's bytes or an error. Without: so is every image of a made index."""
    root = Path(tempfile.mkdtemp(dir=folder))
    for path, whole in packed()[0].items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(whole)

    def read() -> None:
        listing = Index.read(root).split("train")[0]
        inside = root.resolve()
        assert all((root / shard.file).resolve().is_relative_to(inside) for shard in listing.shards), "leads out"
        if problems := [*listing.missing(), *filter(None, listing.damaged())]:
            raise UserError(problems[0])
        for got in listing.read_bytes(range(len(listing))):
            assert isinstance(got, UserError) or got in packed()[1] or name.endswith(".json"), "other bytes"
            if isinstance(got, UserError):
                raise got

    def index() -> None:
        (root / INDEX).unlink()
        index_shards(root)
        listing = Index.read(root).split("train")[0]
        again = listing.read_bytes(range(len(listing)))
        assert not any(isinstance(got, UserError) for got in again), again

    try:
        if name.endswith(".json"):
            (root / INDEX).write_bytes(data)
            return refused(str(root), read)
        (root / "train/000000.tar").write_bytes(data)
        outcome = refused(str(root), read)
        assert outcome == "refused" or data == packed()[0]["train/000000.tar"], (
            "a damaged shard is taken for a whole one"
        )
        return refused(str(root), index)
    finally:
        shutil.rmtree(root)


# -- run folders ------------------------------------------------------------------------------------------------------

#: Of a run that is one step from its end: every image and record is small.
RUN = {"model": "sgformer_n", "weights": "none", "image_size": 32, "batch_size": 4, "epochs": 1, "max_steps": 1,
       "warmup_epochs": 0, "workers": 0, "device": "cpu", "native": "off", "log_every": 1,
       "record_significance": 1}  # fmt: skip
ELSEWHERE = (
    *("ftp://user:secret@127.0.0.1:9/x", "http://169.254.169.254/latest", "https://user:secret@sgformer.invalid/x"),
    *("s3://bucket/x", "gs://bucket/x", "memory://x", "simplecache::http://sgformer.invalid/x", "file://host/x"),
    *("//sgformer.invalid/x", "\\\\sgformer.invalid\\x", "hf-hub:sgformer/invalid", "hf_hub:sgformer/invalid"),
)


@functools.cache
def a_run() -> tuple[Path, Path]:
    """The folder of a run of three small classes, after one of its two epochs, and its data; kept until the end."""
    work = Path(tempfile.mkdtemp(prefix="sgformer-run-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    photos = make_photos(work / "photos", train=2, val=1)
    with contextlib.redirect_stdout(io.StringIO()):
        sgformer.train("classify", data=str(photos), run=str(work / "run"), **RUN)
    return work / "run", photos


def run_places() -> list[str]:
    """What a run folder may hold: all files and folders of a run, those of `eval` and unfinished ones."""
    run = a_run()[0]
    found = sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))
    files = [name for name in found if (run / name).is_file()]
    return [*found, *(f"{name}.tmp" for name in files), "eval", "eval/metrics.json", "out", "out/0.png", "out/0000.png"]


def run_commands(run: Path, photos: Path) -> dict[str, list[str]]:
    """Command lines that read a run folder of somebody else's and write, by default or as asked, below it."""
    image, cpu = str(photos / "val/ant/0.png"), ["--device", "cpu"]
    return {
        "resume": ["train", "classify", "--resume", str(run), "--max-steps", "2", "--epochs", "2"],
        "eval": ["eval", str(run), "--data", str(photos), "--workers", "0", *cpu],
        "eval --out": ["eval", str(run), "--data", str(photos), "--workers", "0", "--out", str(run / "out"), *cpu],
        "predict": ["predict", str(run), image, "--out", str(run / "out"), "--json", str(run / "out/0.json"), *cpu],
        "features": ["predict", str(run), image, "--features", str(run / "out/f.npz"), *cpu],
        "explain": ["explain", str(run), image, "--out", str(run / "out"), "--arrays", *cpu],
        "app": [],  # the examples of its page
    }


def mutated_runs(seed: int = 0) -> Inputs:
    """What to plant in a run folder: links, settings, damage; and a command that then uses it."""
    rng, number = random.Random(seed), 0
    fields_ = ("data", "val_data", "weights", "teacher", "teacher_classes", "model", "images", "run")
    while True:
        links = {}
        for name in rng.sample(run_places(), rng.choice((0, 1, 1, 2, 8))):
            links[name] = rng.choice(("file", "file", "folder", "nothing", "device"))
        settings = {}
        if rng.random() < 0.5:
            settings = {rng.choice(fields_): rng.choice((*ELSEWHERE, *WORDS)) for _ in range(rng.choice((1, 1, 2)))}
        damaged = []
        if rng.random() < 0.4:
            damaged = rng.sample(
                [name for name in run_places() if (a_run()[0] / name).is_file()], rng.choice((1, 1, 3))
            )
        command = rng.choice([*run_commands(Path(), Path()), "resume"])
        plan = {"links": links, "settings": settings, "damaged": damaged, "seed": number, "command": command}
        yield f"{number}.json", json.dumps(plan).encode()
        number += 1


def try_run(name: str, data: bytes, folder: Path) -> str:
    """Done, or refused in one line; what links lead to is as it was, and nothing was called or looked up."""
    plan = json.loads(data)
    work = Path(tempfile.mkdtemp(dir=folder))
    run, outside = work / "run", work / "outside"
    try:
        shutil.copytree(a_run()[0], run)
        (outside / "folder").mkdir(parents=True)
        (outside / "folder" / "0001").mkdir()
        (outside / "folder" / "0001" / "mine.txt").write_text("mine")
        (outside / "file").write_text("mine")
        targets = {"file": outside / "file", "folder": outside / "folder", "nothing": outside / "new",
                   "device": Path("/dev/full")}  # fmt: skip
        rng = random.Random(plan["seed"])
        for place in plan["damaged"]:
            (run / place).write_bytes(mutate((run / place).read_bytes(), rng))
        for place, kind in plan["links"].items():
            plant(run / place, targets[kind])
        config = run / "config.yaml"
        if plan["settings"] and config.is_file() and not config.is_symlink():
            with contextlib.suppress(yaml.YAMLError, ValueError, TypeError):  # it may be damaged
                config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | plan["settings"]))
        before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
        with offline() as asked:
            words = run_commands(run, a_run()[1])[plan["command"]]
            outcome = _status_of(words) if words else refused("", lambda: examples_of(run, None))
        assert not asked, f"looked for {asked}"
        after = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
        assert after == before, f"written through a link: {set(after) ^ set(before) or 'changed'}"
        return outcome
    finally:
        shutil.rmtree(work)


def plant(place: Path, target: Path) -> None:
    """Put a link in the place of whatever is there; not below another link."""
    if any(part.is_symlink() for part in place.parents):
        return
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


@contextlib.contextmanager
def offline() -> Iterator[list[Any]]:
    """Within the block no name is looked up and no other machine is called; yields what was tried."""
    asked: list[Any] = []

    def refuse(*words: Any, **_: Any) -> Any:
        asked.append(words[-2:] if len(words) > 2 else words)
        raise OSError("no network here")

    class Deaf(socket.socket):
        def connect(self, address: Any) -> None:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(address)
            super().connect(address)

        connect_ex = connect

    with contextlib.ExitStack() as stack:
        for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
            stack.enter_context(mock.patch.object(socket, name, refuse))
        stack.enter_context(mock.patch.object(socket, "socket", Deaf))
        yield asked


def _status_of(arguments: list[str]) -> str:
    """ "accepted" or "refused" by a command; the error is one line that a terminal can show, without a password."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    said = err.getvalue()
    assert status in (0, 1, 2) and "Traceback" not in said, f"status {status}: {said}"
    assert status != 2 or said.count("sgformer: error: ") == 1, said
    shown = (out.getvalue() + said).replace("\n", "")
    assert shown.isprintable() and "secret" not in shown, ascii(shown)[-2000:]
    return "refused" if status == 2 else "accepted"


# -- settings ---------------------------------------------------------------------------------------------------------

CONFIGS = {name: get_task(name).Config for name in TASKS}
WORDS = (
    *("", "-1", "0", "1", "2", "1.5", "-0.0", "1e400", "nan", "inf", "null", "None", "true", "99999999999999999999"),
    *("[]", "[1,2]", "[32,32]", "{}", "a: b", "[", "*x", "&x", "!!python/object/apply:os.system ['true']"),
    *("x", "..", "/", "/dev/null", "/proc/self/mem", "a\nb", "é", "--", "-", "=", "'", "%", "$HOME", "~"),
    *(
        "rand-m9",
        "cuda:99",
        "mps",
        "cpu",
        "adamw",
        "softmax",
        "single",
        "upernet",
        ".5:28,.5:7/.5:4,.5:2/1:1",
        "8,4,1/4",
    ),
)


def mutated_commands(seed: int = 0) -> Iterator[list[str]]:
    """Command lines of `train`, with options and values that rarely make sense; data is never there."""
    rng = random.Random(seed)
    while True:
        task = rng.choice(list(CONFIGS))
        names = [f.name.replace("_", "-") for f in fields(CONFIGS[task]) if f.name not in ("run", "data")]
        words: list[str] = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            name = rng.choice(names)
            if rng.random() < 0.2:
                name = mutate(name.encode(), rng).decode("latin-1").replace("\0", "").replace("\n", "") or "x"
            value = rng.choice(WORDS)
            words += [f"--{name}={value}"] if rng.random() < 0.5 else [f"--{name}", value]
        yield ["train", task, *words, "--data", "nowhere"]


def try_command(arguments: list[str]) -> str:
    """Status 2 and one line, whatever was asked: the data are not there."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    said = err.getvalue()
    if status == 0 and out.getvalue().startswith("usage:"):  # a mutation asked for --help
        return "accepted"
    assert status == 2, f"status {status}: {said}"
    assert said.startswith("sgformer: error: ") and said.count("\n") == 1 and "Traceback" not in said, said
    return "refused"


def mutated_recipes(seed: int = 0) -> Inputs:
    rng, number = random.Random(seed), 0
    whole = b"model: sgformer_n\nlr: 2e-5\nepochs: 7\nauto_augment: null\nimage_size: [64, 96]\nmixup: 0.2\nema: 0.99\n"
    keys = whole.decode().split("\n")[:-1]
    while True:
        lines = [line.split(":")[0] + ": " + rng.choice(WORDS) if rng.random() < 0.2 else line for line in keys]
        data = "\n".join(lines).encode()
        yield f"{number}.yaml", mutate(data, rng) if rng.random() < 0.5 else data
        number += 1


def try_recipe(name: str, data: bytes, folder: Path) -> str:
    path = folder / name
    path.write_bytes(data)
    try:
        return try_command(["train", "classify", "--config", str(path), "--data", "nowhere"])
    finally:
        path.unlink()


def try_settings(data: bytes, folder: Path) -> None:
    """A run's `config.yaml`: what is let through opens no connection."""
    path = folder / "config.yaml"
    path.write_bytes(data)
    for config in CONFIGS.values():
        values: dict[str, Any] = {}

        def read(config: Any = config, values: dict[str, Any] = values) -> None:
            found = read_yaml(path, config)
            refuse_remote(path, config, found, {})
            values.update(found)

        refused("config.yaml", read)
        texts = [value for value in values.values() if isinstance(value, str)]
        assert all(Store(text).local and not text.startswith(("//", "\\\\", "file:")) for text in texts), texts


def try_text(text: str) -> None:
    """Whatever it is: one line that a terminal and Markdown show as text, without a password."""
    for shown in (printable(text), markdown(text), str(UserError(text)), printable(without_login(text))):
        assert shown.isprintable()
    assert without_login(without_login(text)) == without_login(text)
    assert not re.search(r"[<>]|(?<!\\)(?:\\\\)*[`*_|$\[\]~]|://|www\.", markdown(text))
    out = io.StringIO()
    say(text, file=out)
    assert out.getvalue().endswith("\n") and out.getvalue()[:-1].isprintable()


def try_yaml(data: bytes, folder: Path) -> None:
    """The config loader alone, for fuzzing by coverage."""
    path = folder / "c.yaml"
    path.write_bytes(data)
    for config in CONFIGS.values():
        refused("", lambda config=config: make_config(config, read_yaml(path, config)))
