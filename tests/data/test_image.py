"""Every kind of image is read as a viewer shows it; every broken one is named in one line."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data.image import IMAGE_EXTENSIONS, MAX_PIXELS, probe_image, read_image

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
