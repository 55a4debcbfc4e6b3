"""Read any image file as a viewer displays it: upright, 8-bit RGB, first frame, transparency on white."""

from __future__ import annotations

import contextlib
import io
import math
import os
import queue
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sgformer.core.errors import StalledError, UserError
from sgformer.data.addons import ADDONS, HEAD, activate, addon_of

#: File name extensions (lower case) of images in listed folders.
IMAGE_EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".webp",
        ".avif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        *(extension for extension, addon in ADDONS.items() if addon.installed),
    ]
)

#: Larger images are rejected before decoding. 128 Mpx are 384 MB as RGB.
MAX_PIXELS = 128 * 2**20

#: Files up to this many bytes are read completely before decoding.
SMALL_FILE = 64 * 2**20

#: Seconds after which an unresponsive read is an error.
READ_TIMEOUT = 300.0

T = TypeVar("T")
ImageSource = str | os.PathLike | bytes | IO[bytes]
Images = str | os.PathLike[str] | Image.Image | Iterable[str | os.PathLike[str] | Image.Image]

# Pillow's own limit and its metadata warnings would appear once per file and worker; MAX_PIXELS is our limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.\w+ImagePlugin")


# -- which images, and each as RGB ------------------------------------------------------------------------------------


def find_images(sources: Iterable[str | os.PathLike[str] | Image.Image]) -> Iterator[Path | Image.Image]:
    """Yield files unchanged, and for each folder its images in sorted order.

    Raises:
        UserError: a file does not exist, or a folder holds no images.
    """
    for source in sources:
        if isinstance(source, Image.Image):
            yield source
            continue
        path = Path(source)
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"{path}: no such image or folder")
            yield path
            continue
        files = sorted(
            p for p in path.rglob("*") if p.suffix.lower() in IMAGE_EXTENSIONS and not p.name.startswith(".")
        )
        if not files:
            raise UserError(f"{path}: no images in this folder")
        yield from files


def list_images(images: Images) -> list[Path | Image.Image]:
    """`find_images` of one or several files, folders or PIL images."""
    return list(find_images([images] if isinstance(images, (str, os.PathLike, Image.Image)) else images))


def source_name(source: Path | Image.Image, number: int) -> str:
    """The image's name in results: its path or, for an image object, its position as text."""
    return str(number) if isinstance(source, Image.Image) else str(source)


def open_image(source: Path | Image.Image) -> Image.Image:
    """Open an image as RGB; see `read_image`."""
    return source.convert("RGB") if isinstance(source, Image.Image) else read_image(source)


class ImageHeader(NamedTuple):
    """Image header: size after EXIF rotation, Pillow's mode, EXIF orientation (1 = upright)."""

    width: int
    height: int
    mode: str
    orientation: int


def read_image(
    source: ImageSource,
    name: str | None = None,
    *,
    formats: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Read an image as a viewer displays it.

    EXIF rotation is applied; transparency (alpha, palette or colour key) is composited on white; CMYK, grey, palette
    and 1-bit become RGB; an animation gives its first frame. 16-bit grey is scaled by its full range 65535, never
    clipped; 32-bit integers by 65535 or, where a value goes beyond, by 2^31 - 1. Floats within [0, 1] are scaled by
    255, others stretched from minimum to maximum; NaN is 0. Colour profiles are not applied.

    Args:
        source: a path, the bytes of a file, or a seekable binary file object.
        name: the image's name in error messages; by default the path.
        formats: Pillow's formats to try, such as "PNG"; by default all.
        max_pixels: larger images are rejected before decoding.

    Returns:
        A PIL image of mode RGB, fully loaded.

    Raises:
        UserError: the file is missing, empty, truncated, not an image, or larger than `max_pixels`; names the file.
        StalledError: the path does not respond, see `in_time`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _read(source, name, formats, max_pixels)
    name = name or str(source)
    # Only the read runs in another thread: decoding there and handing over the pixels costs 10 % more.
    content = in_time(lambda: _small_file(source), source)
    if content is not None:
        return _read(content, name, formats, max_pixels)
    return in_time(lambda: _read(source, name, formats, max_pixels), source)


def _small_file(path: str | os.PathLike[str]) -> bytes | None:
    """The content of a file; None if it is too large, or unreadable, which opening it will report."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size or SMALL_FILE  # devices report 0
            # Read no more than the size: allocating for a large file costs 10 % of decoding a small one.
            content = file.read(size + 1) if size <= SMALL_FILE else None
        return content if content is not None and len(content) <= size else None
    except OSError:
        return None


def _read(source: ImageSource, name: str | None, formats: Sequence[str] | None, max_pixels: int) -> Image.Image:
    with opened(source, name, formats, max_pixels) as image:
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)


def probe_image(source: ImageSource, name: str | None = None) -> ImageHeader:
    """Read an image's header only.

    Raises:
        UserError: as `read_image`, as far as detectable without decoding.
    """
    with opened(source, name) as image:
        orientation = _orientation(image)
        width, height = image.size
        # Pillow already swaps the sides of a rotated TIFF on opening, and rotates it on loading.
        if orientation >= 5 and image.format != "TIFF":
            width, height = height, width
        return ImageHeader(width, height, image.mode, orientation)


def in_time(read: Callable[[], T], path: str | os.PathLike[str]) -> T:
    """Run a read in a separate thread, which is abandoned if the disk or network mount does not respond.

    Args:
        read: the read.
        path: the file's name for the error.

    Raises:
        StalledError: it took longer than the environment's `SGFORMER_READ_TIMEOUT` seconds (default 300; 0: no limit).
    """
    limit = float(os.environ.get("SGFORMER_READ_TIMEOUT", READ_TIMEOUT))
    if not limit:
        return read()
    reader = _Reader.take()
    reader.todo.put(read)
    try:
        result, failure = reader.done.get(timeout=limit)
    except queue.Empty:
        raise StalledError(
            f"{path}: no answer for {limit:g} seconds: does its disk or network mount respond? "
            "(SGFORMER_READ_TIMEOUT=SECONDS waits longer, 0: no limit)"
        ) from None
    _Reader.idle.append(reader)
    if failure is not None:
        raise failure
    return result


class _Reader(threading.Thread):
    """A reusable thread that runs reads one by one: a new thread per image would cost 5 % of decoding it."""

    idle: ClassVar[deque[_Reader]] = deque()

    def __init__(self) -> None:
        super().__init__(daemon=True)  # a stuck thread must not keep the process alive
        self.process = os.getpid()
        self.todo: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    @classmethod
    def take(cls) -> _Reader:
        while cls.idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                reader = cls.idle.pop()
                if reader.process == os.getpid():  # threads do not survive a fork
                    return reader
        reader = cls()
        reader.start()
        return reader

    def run(self) -> None:
        while True:
            read = self.todo.get()
            try:
                outcome: tuple[Any, BaseException | None] = read(), None
            except BaseException as error:
                outcome = None, error
            del read
            self.done.put(outcome)
            del outcome  # free the image before waiting for the next read


@contextmanager
def opened(
    source: ImageSource, name: str | None, formats: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Open an image lazily within the pixel limit; any failure in the block becomes a UserError that names it."""
    if name is None:
        path = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
        name = str(path or "image")
    try:
        if isinstance(source, (str, os.PathLike)):
            with Path(source).open("rb") as file:
                yield _checked(file, formats, max_pixels)
        else:
            yield _checked(io.BytesIO(source) if isinstance(source, bytes) else source, formats, max_pixels)
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise UserError(f"{name}: {_reason(error, formats, max_pixels)}") from error


def _checked(file: IO[bytes], formats: Sequence[str] | None, max_pixels: int) -> Image.Image:
    head = file.read(HEAD)
    if not head:
        raise EOFError("0 bytes")
    file.seek(0)
    if formats is None and (addon := addon_of(head)):
        if not addon.installed:
            raise UnidentifiedImageError(addon.advice)
        activate(addon)
    image = Image.open(file, formats=None if formats is None else tuple(formats))
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return image


def _reason(error: Exception, formats: Sequence[str] | None, max_pixels: int) -> str:
    """Why an image could not be read, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not an image"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        if text in {addon.advice for addon in ADDONS.values()}:
            return text
        return "not an image, or not of a format " + (
            "that Pillow supports" if formats is None else f"accepted here: {', '.join(formats)}"
        )
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"too large, the limit is {max_pixels} pixels ({text.split(' exceeds')[0]})"
    if text == "0 bytes":
        return "the file is empty (0 bytes)"
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return (
            f"the file is truncated ({text.removeprefix('image file is truncated').strip(' ()') or 'unexpected end'})"
        )
    return f"the image is damaged ({text or type(error).__name__})"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if missing or unreadable."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # viewers ignore broken EXIF data
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.mode in ("La", "RGBa"):  # premultiplied; only their straight-alpha modes convert further
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale a grey image (H, W) of 16-bit, 32-bit or float values to uint8; see `read_image`."""
    if np.issubdtype(values.dtype, np.floating):
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        if low >= 0.0 and high <= 1.0:
            low, high = 0.0, 1.0
    else:
        low, high = 0.0, 65535.0 if values.max() <= 65535 else 2.0**31 - 1
    scale = 255.0 / ((high - low) or 1.0)
    result = np.empty(values.shape, np.uint8)
    rows = max(1, 2**20 // values.shape[1])  # per chunk: float64 of a complete large image would need too much memory
    for start in range(0, len(values), rows):
        part = values[start : start + rows].astype(np.float64)
        result[start : start + rows] = np.rint((part.clip(low) - low) * scale)
    return result


#: Maximum ratio of the long side to the short side's target: 2048 for 512.
LONG_TO_SHORT = 4


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """An image size as (height, width): one number means a square."""
    if isinstance(image_size, int):
        return image_size, image_size
    return image_size[0], image_size[1]


def fit_size(height: int, width: int, short_side: int, factor: float = 1.0) -> tuple[int, int]:
    """The size with the short side `short_side * factor`, or the long side 4 times that if this is smaller.

    The aspect ratio is kept; both sides are at least 32 pixels, the backbones' minimum.
    """
    ratio = factor * min(short_side / min(height, width), LONG_TO_SHORT * short_side / max(height, width))
    return max(32, int(height * ratio + 0.5)), max(32, int(width * ratio + 0.5))


# Image sides of the published detection recipes, in pixels.
SHORT, LONGEST = 800, 1333


def short_and_longest(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """A detector's `--image-size`: the short side, and the maximum of the long one (by default 1333 / 800 of it)."""
    if isinstance(image_size, int):
        return image_size, round(image_size * LONGEST / SHORT)
    return image_size[0], image_size[1]


def centre(image: Image.Image, size: tuple[int, int], crop_pct: float, interpolation: str = "bicubic") -> np.ndarray:
    """Resize to ``size / crop_pct``, crop the centre: (height, width, 3) uint8. As timm evaluates."""
    goal = [math.floor(side / crop_pct) for side in size]
    if goal[0] == goal[1]:
        short, long = sorted(image.size)
        sides = goal[0], int(goal[0] * long / short)
        width, height = sides if image.width <= image.height else sides[::-1]
    else:
        ratio = min(image.height / goal[0], image.width / goal[1])
        height, width = round(image.height / ratio), round(image.width / ratio)
    image = (
        image
        if image.size == (width, height)
        else image.resize((width, height), Image.Resampling[interpolation.upper()])
    )
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return np.asarray(image.crop((left, top, left + size[1], top + size[0])))
