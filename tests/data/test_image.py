"""Every kind of image is read as a viewer shows it; every broken one is named in one line."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data.ade20k import read_label_map
from sgformer.data.image import (
    IMAGE_EXTENSIONS,
    MAX_PIXELS,
    Images,
    centre,
    find_images,
    open_image,
    probe_image,
    read_image,
)
from sgformer.data.imagefolder import list_split

WHITE = (255, 255, 255)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = read_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values) -> np.ndarray:
    return np.repeat(np.array(values, np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_its_full_range(format):
    data = encoded(Image.fromarray(np.array([[0, 257, 300, 32896, 65535]], np.uint16)), format)
    np.testing.assert_array_equal(pixels(data), grey([[0, 1, 1, 128, 255]]))


def test_32_bit_integers():
    sixteen = np.array([[0, 32896, 65535]], np.int32)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(sixteen), "TIFF")), grey([[0, 128, 255]]))
    full = np.array([[0, 2**30, 2**31 - 1]], np.int32)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(full), "TIFF")), grey([[0, 128, 255]]))


def test_float_grey():
    unit = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(unit), "TIFF")), grey([[0, 128, 255, 0]]))
    wide = np.array([[-10.0, 0.0, 10.0]], np.float32)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(wide), "TIFF")), grey([[0, 128, 255]]))
    constant = np.full((2, 2), 7.0, np.float32)
    assert len(np.unique(pixels(encoded(Image.fromarray(constant), "TIFF")))) == 1


def test_grey_and_1_bit():
    values = np.array([[0, 100, 255]], np.uint8)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(values), "PNG")), grey(values))
    bits = Image.fromarray(np.array([[True, False, True]]))
    np.testing.assert_array_equal(pixels(encoded(bits, "PNG")), grey([[255, 0, 255]]))


def test_alpha_is_composited_on_white():
    rgba = np.array([[[200, 0, 0, 255], [9, 9, 9, 0], [0, 0, 255, 51]]], np.uint8)
    expected = [[(200, 0, 0), WHITE, (204, 204, 255)]]
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(rgba), "PNG")), expected)
    la = np.array([[[0, 255], [0, 0], [0, 51]]], np.uint8)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(la, "LA"), "PNG")), grey([[0, 255, 204]]))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_and_its_transparency(format):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    np.testing.assert_array_equal(pixels(encoded(image, format)), [[(255, 0, 0), (0, 255, 0), (0, 0, 255)]])
    np.testing.assert_array_equal(pixels(encoded(image, format, transparency=1)), [[(255, 0, 0), WHITE, (0, 0, 255)]])


def test_transparent_colour_of_rgb_and_grey():
    rgb = Image.fromarray(np.array([[[10, 20, 30], [1, 2, 3]]], np.uint8))
    np.testing.assert_array_equal(pixels(encoded(rgb, "PNG", transparency=(10, 20, 30))), [[WHITE, (1, 2, 3)]])
    values = Image.fromarray(np.array([[7, 8]], np.uint8))
    np.testing.assert_array_equal(pixels(encoded(values, "PNG", transparency=7)), grey([[255, 8]]))


def test_cmyk():
    inks = np.array([[[0, 255, 255, 0], [255, 0, 255, 0], [0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    expected = np.array([[(255, 0, 0), (0, 255, 0), WHITE, (0, 0, 0)]])
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(inks, "CMYK"), "TIFF")), expected)
    large = Image.fromarray(np.repeat(np.repeat(inks, 16, 0), 16, 1), "CMYK")
    jpeg = pixels(encoded(large, "JPEG", quality=100, subsampling=0))
    np.testing.assert_allclose(jpeg[8, 8::16].astype(int), expected[0], atol=6)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_rotation(format, orientation):
    stored = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    stored = stored.repeat(16, 0).repeat(16, 1)  # JPEG's blocks
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    data = encoded(Image.fromarray(stored), format, exif=exif, **lossless)
    expected = TURNS[orientation](stored)
    np.testing.assert_allclose(pixels(data).astype(int), expected, atol=6 if format == "JPEG" else 0)
    header = probe_image(data)
    assert (header.height, header.width, header.orientation) == (*expected.shape[:2], orientation)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(pixels(data), np.full((3, 4, 3), (255, 0, 0)))


def test_path_bytes_and_file_give_the_same(tmp_path):
    data = encoded(Image.effect_noise((20, 10), 50), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    expected = pixels(data)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), expected)
    np.testing.assert_array_equal(np.asarray(read_image(str(tmp_path / "a.png"))), expected)
    with open(tmp_path / "a.png", "rb") as file:
        np.testing.assert_array_equal(np.asarray(read_image(file)), expected)
    assert probe_image(tmp_path / "a.png")[:3] == (20, 10, "L")


def png_without_pixels(width: int, height: int) -> bytes:
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


NOISE = Image.effect_noise((64, 64), 80).convert("RGB")
BROKEN = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"this is not an image at all", "not an image"),
    "cut.jpg": (encoded(NOISE, "JPEG")[:-500], "truncated"),
    "cut.png": (encoded(NOISE, "PNG")[:-500], "truncated|damaged"),
    "head.png": (encoded(NOISE, "PNG")[:20], "truncated|damaged|not an image"),
    "bomb.png": (png_without_pixels(100_000, 100_000), "too large"),
    "large.png": (png_without_pixels(MAX_PIXELS // 8 + 1, 8), "too large"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_the_reason_in_one_line(tmp_path, name):
    data, reason = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: .*({reason})") as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(UserError, match="upload 7: the file is empty"):
        read_image(b"", name="upload 7")


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]), st.data())
def test_damage_gives_an_image_or_a_user_error_never_anything_else(format, data):
    content = bytearray(encoded(NOISE.resize((16, 16)), format))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert read_image(content).mode == "RGB"
    except UserError as error:
        assert "\n" not in str(error)


def test_extensions_are_lower_case_with_a_dot():
    assert {".jpg", ".jpeg", ".png"} <= IMAGE_EXTENSIONS
    assert all(name == name.lower() and name.startswith(".") for name in IMAGE_EXTENSIONS)


def in_memory(values: np.ndarray) -> list[np.ndarray]:
    """What `open_image` makes of an array, and of the tensor of the same values."""
    channels_first = torch.from_numpy(values if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1)))
    return [np.asarray(open_image(source)) for source in (values, channels_first)]


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_pil_image_is_read_as_its_file(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(NOISE.resize((40, 24)).convert("RGB"), format, exif=exif)
    expected = pixels(data)
    image = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(np.asarray(open_image(image)), expected)
    np.testing.assert_array_equal(np.asarray(open_image(image)), expected)  # it was not changed
    np.testing.assert_array_equal(np.asarray(open_image(data)), expected)
    np.testing.assert_array_equal(np.asarray(open_image(io.BytesIO(data))), expected)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)),
        Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)),
        Image.fromarray(np.array([[-10.0, 0.0, 10.0]], np.float32)),
        Image.fromarray(np.array([[0, 32896, 65535]], np.int32)),
        Image.fromarray(np.array([[[200, 0, 0, 255], [9, 9, 9, 0], [0, 0, 255, 51]]], np.uint8)),
        Image.fromarray(np.array([[[0, 255], [0, 0], [0, 51]]], np.uint8), "LA"),
        Image.fromarray(np.array([[0, 100, 255]], np.uint8)),
        Image.fromarray(np.array([[True, False]])),
    ],
    ids=lambda image: image.mode,
)
def test_a_pil_image_and_an_array_are_read_as_the_file(image):
    expected = pixels(encoded(image, "TIFF" if image.mode in ("F", "I") else "PNG"))
    np.testing.assert_array_equal(np.asarray(open_image(image)), expected)
    for values in in_memory(np.array(image)):
        np.testing.assert_array_equal(values, expected)


def test_arrays_and_tensors_of_every_kind_give_the_same_pixels():
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for values in (colours, colours.astype(np.uint16) * 257, colours / 255, (colours / 255).astype(np.float32)):
        for found in in_memory(values):
            np.testing.assert_array_equal(found, colours)
    half = torch.from_numpy(colours.transpose(2, 0, 1) / 255).to(torch.bfloat16)
    np.testing.assert_allclose(np.asarray(open_image(half)).astype(int), colours, atol=2)
    np.testing.assert_array_equal(np.asarray(open_image(colours[..., :1])), np.repeat(colours[..., :1], 3, -1))
    for alpha in (np.full((5, 7, 1), 255, np.uint8), np.zeros((5, 7, 1), np.uint8)):
        expected = colours if alpha.all() else np.full_like(colours, 255)
        for found in in_memory(np.concatenate([colours, alpha], -1)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((3, 5, 7), np.uint8), "an array must be (height, width)"),
        (np.zeros((0, 5, 3), np.uint8), "got 0 x 5 x 3"),
        (np.float32(1) - 2 * np.ones((5, 7, 3), np.float32), "floats must be in 0..1, not normalised, got -1 to -1"),
        (np.full((5, 7, 3), 200.0), "values of 0..255 belong in uint8"),
        (np.full((5, 7, 3), np.nan), "floats must be in 0..1"),
        (np.zeros((5, 7, 3), np.int64), "got int64"),
        (np.zeros((5, 7), complex), "got complex128"),
        (torch.zeros(5), "a tensor (channels, height, width); got 5"),
        (b"GIF89a", "not an image"),
        (b"", "the file is empty"),
        (7, "an image is a file, bytes, a PIL image, an array or a tensor, got int"),
        (None, "got NoneType"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_named_in_one_line(source, words):
    with pytest.raises(UserError) as error:
        open_image(source, 3)
    assert str(error.value).startswith("image 3: ") and words in str(error.value)


def test_a_closed_or_broken_pil_image_is_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(NOISE, "PNG")[:400])
    with pytest.raises(UserError, match=r"cut\.png: the file is truncated"):
        open_image(Image.open(tmp_path / "cut.png"))
    with Image.open(tmp_path / "cut.png") as closed:
        pass
    with pytest.raises(UserError, match=r"cut\.png: "):
        open_image(closed)


def test_images_of_every_form_and_in_one_list(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    image.save(tmp_path / "a.png")
    file = tmp_path / "a.png"
    batch = np.stack([colours, colours])
    tensors = torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())
    content = file.read_bytes()
    single = [file, str(file), tmp_path, image, content, io.BytesIO(content), colours]
    several = [(batch, 2), (tensors, 2), (iter([file, image]), 2), ([tmp_path, colours, tensors], 4)]
    for source, count in [*((one, 1) for one in single), *several]:
        images = Images(source)
        assert len(images) == count
        for _, found in images:
            np.testing.assert_array_equal(np.asarray(found), colours)
    assert [name for name, _ in Images([file, image])] == [str(file), "1"]
    for nothing in ([], np.zeros((0, 5, 7, 3), np.uint8)):
        with pytest.raises(UserError, match="no image was given"):
            Images(nothing)


def test_a_folder_is_listed_as_training_lists_it(tmp_path):
    """Hidden files and folders are not read, links are followed, and a link that leads back up does not matter."""
    for name in ("p/b.png", "p/.hidden/x.png", "p/.y.png", "p/sub/a.PNG", "p/note.txt", "elsewhere/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(tmp_path / name, "PNG")
    (tmp_path / "p/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p/back").symlink_to(tmp_path / "p")
    found = [path.relative_to(tmp_path / "p").as_posix() for path in find_images(tmp_path / "p")]
    assert found == ["b.png", "linked/c.jpg", "sub/a.PNG"]
    listed = list_split(tmp_path, "p", ["linked", "sub"])[0].paths
    assert set(listed) == set(found) - {"b.png"}


def test_bad_images_stop_or_are_left_out(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    (tmp_path / "ab.png").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"ab\.png: not an image"):
        list(Images(tmp_path))
    left_out: list[str] = []
    several = [tmp_path, tmp_path / "gone.png", tmp_path / "empty", b"", Image.new("L", (2, 2))]
    images = Images(several, "skip", left_out.append)
    assert [Path(name).name for name, _ in images] == ["a.png", "b.png", "4"]
    assert [Path(line.split(":")[0]).name for line in left_out] == ["gone.png", "empty", "ab.png", "image 3"]
    assert images.skipped == left_out
    with pytest.warns(UserWarning, match=r"left out: .*gone\.png: no such image or folder"):
        Images([tmp_path, tmp_path / "gone.png"], "skip")
    with pytest.raises(UserError, match=r"gone\.png: no such image or folder$"):
        Images([tmp_path / "gone.png"], "skip")
    batches = list(Images([tmp_path], "skip", left_out.append).batches(2))
    assert [[Path(name).name for name, _ in batch] for batch in batches] == [["a.png", "b.png"]]


@pytest.mark.parametrize("value", [6, (6,), 6.0], ids=str)
def test_odd_exif_tags_cost_no_image(value):
    """Tags that Pillow cannot write again, as cameras and editors leave them, beside an orientation of any type."""
    image = NOISE.resize((24, 16)).convert("RGB")
    opened = Image.open(io.BytesIO(encoded(image, "PNG")))
    opened.getexif()[0x0112] = value
    opened.getexif()[0x829A] = object()  # what `Exif.tobytes` fails on
    np.testing.assert_array_equal(np.asarray(open_image(opened)), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (3, 40_000)])
def test_elongated_images_take_little_memory(size, monkeypatch):
    """The resized image of 20,000 x 1 pixels would have a billion: only the part in the centre is made."""
    made: list[int] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, to, *args, **more: (made.append(to[0] * to[1]), resize(self, to, *args, **more))[1],
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    assert centre(image, (224, 224), 0.9).shape == (224, 224, 3) and made == [224 * 224]


def test_elongated_images_show_their_centre():
    ramp = np.linspace(0, 255, 1000).astype(np.uint8)[None].repeat(40, 0)[..., None].repeat(3, 2)
    for values in (ramp, ramp.transpose(1, 0, 2).copy()):
        image = Image.fromarray(values)
        side = sorted((64 * 1000 // 40, 64))
        size = side if values.shape[0] > values.shape[1] else side[::-1]
        whole = np.asarray(image.resize(tuple(size), Image.Resampling.BICUBIC)).astype(int)
        top, left = round((whole.shape[0] - 64) / 2), round((whole.shape[1] - 64) / 2)
        expected = whole[top : top + 64, left : left + 64]
        np.testing.assert_allclose(centre(image, (64, 64), 1.0).astype(int), expected, atol=1)


@pytest.mark.parametrize("size, crop_pct", [((64, 64), 0.1), ((32, 96), 0.25)])
def test_a_small_part_of_a_very_large_image_is_resized_alone(monkeypatch, size, crop_pct):
    smooth = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    image = Image.fromarray(smooth).resize((150, 100), Image.Resampling.BICUBIC)
    whole = centre(image, size, crop_pct).astype(int)
    resized = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: resized.append(a[0]) or resize(self, *a, **k))
    monkeypatch.setattr("sgformer.data.image.MAX_PIXELS", 1000)
    part = centre(image, size, crop_pct)
    assert resized == [size[::-1]] and np.abs(part - whole).max() <= 3


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


TURNED = struct.pack("<HHIHxx", 0x0112, 3, 1, 6)
NO_RESOLUTION = struct.pack("<HHIB3x", 0x011A, 7, 1, 72) + struct.pack("<HHIHxx", 0x0128, 3, 1, 2)
LONG_TEXT = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))
#: What Pillow refuses a JPEG or PNG for, though no pixel depends on it; and whether the image is turned.
METADATA = {
    "resolution of one byte": ("JPEG", segment(0xE1, exif(TURNED, NO_RESOLUTION)), True),
    "short JFIF": ("JPEG", segment(0xE0, b"JFIF\0"), False),
    "short Adobe": ("JPEG", segment(0xEE, b"Adobe"), False),
    "short Adobe in an image to turn": ("JPEG", segment(0xE1, exif(TURNED)) + segment(0xEE, b"Adobe"), True),
    "long text": ("PNG", LONG_TEXT, False),
    "long text in an image to turn": ("PNG", LONG_TEXT + chunk(b"eXIf", exif(TURNED)[6:]), True),
    "text with a wrong checksum": ("PNG", chunk(b"tEXt", b"a\0b")[:-1] + b"?", False),
    "unknown compression": ("PNG", chunk(b"iCCP", b"name\0\7abc"), False),
    "short resolution": ("PNG", chunk(b"pHYs", b"abc"), False),
}


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("name", METADATA)
def test_metadata_cost_no_image(name, at_end, tmp_path):
    format, odd, turned = METADATA[name]
    whole = encoded(NOISE.resize((24, 16)), format)
    start = {"JPEG": 2, "PNG": 33}[format]  # behind the mark of the file, and the image's size
    if at_end:
        start = whole.rindex(b"\xff\xda") if format == "JPEG" else len(whole) - 12  # before the pixels; behind them
    data = whole[:start] + odd + whole[start:]
    expected = np.rot90(pixels(whole), -1) if turned else pixels(whole)
    np.testing.assert_array_equal(pixels(data), expected)
    (tmp_path / "odd").write_bytes(data)
    for source in (tmp_path / "odd", io.BytesIO(data)):
        np.testing.assert_array_equal(np.asarray(open_image(source)), expected)
    if not at_end or not turned:  # a header is read up to the pixels
        assert probe_image(tmp_path / "odd")[:2] == expected.shape[1::-1]
    if format == "PNG":
        np.testing.assert_array_equal(read_label_map(labels_with(odd, at_end, tmp_path)), np.eye(8))


def labels_with(odd: bytes, at_end: bool, folder: Path) -> Path:
    whole = encoded(Image.fromarray(np.eye(8, dtype=np.uint8)), "PNG")
    start = len(whole) - 12 if at_end else 33
    (folder / "labels.png").write_bytes(whole[:start] + odd + whole[start:])
    return folder / "labels.png"


def test_without_metadata_colours_are_the_same():
    """An Adobe segment tells that a JPEG holds RGB, and a PNG's transparency is no metadata."""
    rgb = encoded(NOISE, "JPEG", keep_rgb=True)
    np.testing.assert_array_equal(pixels(rgb[:2] + segment(0xE0, b"JFIF\0") + rgb[2:]), pixels(rgb))
    clear = encoded(Image.new("P", (4, 4)), "PNG", transparency=0)
    np.testing.assert_array_equal(pixels(clear[:33] + LONG_TEXT + clear[33:]), np.full((4, 4, 3), 255))


def test_a_broken_file_with_odd_metadata_is_refused_for_what_is_broken():
    whole = encoded(NOISE, "PNG")
    with pytest.raises(UserError, match=r"truncated|damaged"):
        pixels((whole[:33] + LONG_TEXT + whole[33:])[:-500])
