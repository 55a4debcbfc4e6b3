"""Read any image file as a viewer displays it: upright, 8-bit RGB, first frame, transparency on white."""

from __future__ import annotations

import contextlib
import io
import math
import os
import queue
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from sgformer.core.errors import StalledError, UserError
from sgformer.data.addons import ADDONS, HEAD, addon_of
from sgformer.data.metadata import orientation_in, without_metadata

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

#: Pillow's names of the formats that are read, besides those of `ADDONS`. No other decoder is tried: some of Pillow's
#: run programs (Ghostscript for PostScript, whatever the file's name says), and each is C code fed by strangers.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")

#: Larger images are rejected before decoding. 128 Mpx are 384 MB as RGB.
MAX_PIXELS = 128 * 2**20

#: Files up to this many bytes are read completely before decoding.
SMALL_FILE = 64 * 2**20

#: Seconds after which an unresponsive read is an error.
READ_TIMEOUT = 300.0

#: What turns an image of an EXIF orientation upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

T = TypeVar("T")
ImageSource = str | os.PathLike | bytes | IO[bytes]


# -- which images, and each as RGB ------------------------------------------------------------------------------------


class Images:
    """Images to read one by one as RGB: `for name, image in images`.

    Args:
        images: one image or several. A path is a file, or a folder that is searched for images, nested ones and those
            behind links included, hidden ones excluded, as in training. All other forms: see `open_image`; an array
            (N, H, W, C) or tensor (N, C, H, W) is N images.
        bad_images: "stop": an unreadable image raises a UserError; "skip": it is left out.
        on_skip: called with the line of each image left out; by default a warning.
        open: reads one of them, given also its position.

    Attributes:
        sources: what is read, in this order; folders replaced by their files.
        skipped: a line for each image left out so far, with its name and the reason.

    Raises:
        UserError: with "stop", a file does not exist or a folder holds no images; or there is no image at all.
    """

    def __init__(
        self,
        images: Any,
        bad_images: str = "stop",
        on_skip: Callable[[str], None] | None = None,
        open: Callable[[Any, int], Any] | None = None,
    ):
        if bad_images not in ("stop", "skip"):
            raise UserError(f"--bad-images must be stop or skip, got {bad_images!r}")
        self.skips, self.on_skip, self.open = bad_images == "skip", on_skip or _warn, open or open_image
        self.skipped: list[str] = []
        self.sources: list[Any] = []
        missing: list[UserError] = []
        for source in _each(images):
            try:
                self.sources += _files_of(source) if isinstance(source, str | os.PathLike) else _each(source)
            except UserError as error:
                missing.append(error)
                if not self.skips:
                    raise
        if not self.sources:
            more = f" (and {len(missing) - 1} more like it)" if len(missing) > 1 else ""
            raise UserError(f"{missing[0]}{more}" if missing else "no image was given: name a file or a folder")
        for problem in missing:
            self.skip(problem)

    def __len__(self) -> int:
        """The number of images, unreadable ones included."""
        return len(self.sources)

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        """Yield each image's name, its path or its position as text, and the image: PIL, RGB.

        Raises:
            UserError: an image cannot be read, and is not to be skipped.
            StalledError: a disk or mount does not respond; the images may be intact, so this is never skipped.
        """
        for number, source in enumerate(self.sources):
            try:
                image = self.open(source, number)
            except UserError as error:
                self.skip(error)
                continue
            yield source_name(source, number), image

    def batches(self, size: int) -> Iterator[list[tuple[str, Image.Image]]]:
        """As iterating, in lists of up to `size` readable images."""
        images = iter(self)
        while batch := list(islice(images, size)):
            yield batch

    def limited(self, limit: int | None) -> Images:
        """At most `limit` of the images, evenly spaced."""
        if limit is not None and len(self.sources) > limit:
            self.sources = [self.sources[i * len(self.sources) // limit] for i in range(limit)]
        return self

    def skip(self, error: UserError) -> None:
        """Leave out what failed, or raise."""
        if not self.skips or isinstance(error, StalledError):
            raise error
        self.skipped.append(str(error))
        self.on_skip(str(error))


def _warn(line: str) -> None:
    warnings.warn(f"left out: {line}", stacklevel=4)


def walk(folder: Path, suffixes: Sequence[str] | frozenset[str]) -> Iterator[Path]:
    """Files with one of these endings (lower case) below a folder; hidden ones are passed over, links followed once."""
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(here) / name


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The images of a folder in sorted order: nested ones too, links are followed, hidden files and folders are not.

    Raises:
        UserError: it holds no images.
    """
    files = sorted(walk(Path(folder), IMAGE_EXTENSIONS))
    if not files:
        raise UserError(f"{folder}: no images in this folder")
    return files


def _files_of(path: str | os.PathLike[str]) -> list[Path]:
    """A file itself, or a folder's images."""
    path = Path(path)
    if path.is_dir():
        return list(find_images(path))
    if not path.exists():
        raise UserError(f"{path}: no such image or folder")
    return [path]


def _each(images: Any) -> Iterable[Any]:
    """One image as a list; several unchanged. A batch in one array or tensor is several images."""
    if isinstance(images, np.ndarray) or _is_tensor(images):
        return images if images.ndim == 4 else [images]
    single = isinstance(images, str | os.PathLike | Image.Image | bytes | bytearray | memoryview)
    return [images] if single or hasattr(images, "read") or not isinstance(images, Iterable) else images


def source_name(source: Any, number: int) -> str:
    """The image's name in results: its path or, for an image in memory, its position as text."""
    return str(source) if isinstance(source, str | os.PathLike) else str(number)


def open_image(source: Any, number: int = 0) -> Image.Image:
    """Any image as RGB, 8 bits, upright: one in memory is read as its file would be, see `read_image`.

    Args:
        source: a path; the bytes of an image file, or an open one; a PIL image, whose current frame is taken; an array
            (H, W), (H, W, 1), (H, W, 2) grey with alpha, (H, W, 3) or (H, W, 4); a tensor (H, W) or (C, H, W).
            Arrays and tensors are bool, uint8, uint16 (0..65535) or floats in 0..1; (H, W) also as read_image has it.
        number: its position, to name it in errors.

    Raises:
        UserError: it cannot be read; names the file or the position.
    """
    if isinstance(source, str | os.PathLike):
        return read_image(source)
    name = f"image {number}"
    if isinstance(source, bytes | bytearray | memoryview):
        return read_image(bytes(source), name)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or name)
        _refuse_undecoded(source, name)
        with _named_errors(name, FORMATS, MAX_PIXELS):
            return _decoded(_limited(source, MAX_PIXELS))
    if hasattr(source, "read"):
        return read_image(source, str(getattr(source, "name", name)))
    if _is_tensor(source):
        source = source.detach().cpu()
        values = (source.float() if source.is_floating_point() else source).numpy()
        return _from_array(values if values.ndim != 3 else values.transpose(1, 2, 0), name, tuple(source.shape))
    if isinstance(source, np.ndarray):
        return _from_array(source, name, source.shape)
    kind = type(source).__name__
    raise UserError(f"{name}: an image is a file, bytes, a PIL image, an array or a tensor, got {kind}")


def _refuse_undecoded(image: Image.Image, name: str) -> None:
    """Raise UserError if reading the pixels would run a decoder that is none of ours."""
    known = (*FORMATS, "MPO", *(addon.known_as for addon in ADDONS.values()))
    waiting = bool(getattr(image, "tile", None)) or isinstance(image, ImageFile.StubImageFile)
    if waiting and image.format not in known:
        raise UserError(
            f"{name}: {image.format} is not read here ({', '.join(FORMATS)} are): pass image.convert('RGB')"
        )


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # exported files run without it
    return torch is not None and isinstance(value, torch.Tensor)


def _from_array(values: np.ndarray, name: str, shape: Sequence[int]) -> Image.Image:
    """An array (H, W) or (H, W, 1 to 4) as RGB; `shape` is the caller's, for errors."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (2, 3, 4))) or not values.size:
        raise UserError(
            f"{name}: an array must be (height, width) or (height, width, 1 to 4 channels), "
            f"a tensor (channels, height, width); got {' x '.join(map(str, shape)) or 'a single value'}"
        )
    if values.shape[0] * values.shape[1] > MAX_PIXELS:
        raise UserError(f"{name}: too large, the limit is {MAX_PIXELS} pixels ({values.shape[1]} x {values.shape[0]})")
    kind = values.dtype
    if kind == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    elif kind != np.uint8:
        grey = values.ndim == 2
        if not np.issubdtype(kind, np.floating) and kind != np.uint16 and not (grey and kind == np.int32):
            raise UserError(f"{name}: values must be bool, uint8, uint16 or floats in 0..1, got {kind}")
        if np.issubdtype(kind, np.floating) and not grey:
            low, high = float(np.fmin.reduce(values, None)), float(np.fmax.reduce(values, None))
            if not (low >= 0 and high <= 1):
                raise UserError(
                    f"{name}: floats must be in 0..1, not normalised, got {low:g} to {high:g}; values of 0..255 belong "
                    "in uint8"
                )
        flat = values.reshape(len(values), -1)  # rows of grey values: channels are scaled alike
        values = _to_8_bit(flat).reshape(values.shape)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(values)))


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
        formats: Pillow's formats to try, such as "PNG"; by default `FORMATS`, and those of `ADDONS`.
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
    return looked_at(_decoded, source, name, formats, max_pixels)


def looked_at(
    look: Callable[[Image.Image], T],
    source: ImageSource,
    name: str | None,
    formats: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> T:
    """What `look` makes of an opened image; if that fails, of the same without the metadata that it may have failed on.

    Raises:
        UserError: as `read_image`; also for whatever else fails in `look`.
    """
    try:
        with _opened(source, name, formats, max_pixels) as image:
            return look(image)
    except UserError:
        bare = without_metadata(_content(source) or b"")
        if bare is not None:
            with contextlib.suppress(UserError), _opened(bare, name, formats, max_pixels) as image:
                return look(image)
        raise


def _content(source: ImageSource) -> bytes | None:
    """The bytes of an image's file; None if they are too many, or cannot be read."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _small_file(source)
    try:
        source.seek(0)
        content = source.read(SMALL_FILE + 1)
    except (OSError, ValueError):
        return None
    return content if len(content) <= SMALL_FILE else None


def _decoded(image: Image.Image) -> Image.Image:
    """An opened image, loaded, upright, and as RGB."""
    image.load()
    # By hand: ImageOps.exif_transpose writes all tags anew, and fails if any of them is odd.
    method = UPRIGHT.get(_orientation(image))
    return _to_rgb(image if method is None else image.transpose(method))


def probe_image(source: ImageSource, name: str | None = None) -> ImageHeader:
    """Read an image's header only.

    Raises:
        UserError: as `read_image`, as far as detectable without decoding.
    """
    return looked_at(_header, source, name)


def _header(image: Image.Image) -> ImageHeader:
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
def _opened(
    source: ImageSource, name: str | None, formats: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Open an image lazily within the pixel limit; any failure in the block becomes a UserError that names it."""
    if name is None:
        path = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
        name = str(path or "image")
    with _named_errors(name, formats or FORMATS, max_pixels):
        if isinstance(source, (str, os.PathLike)):
            with Path(source).open("rb") as file:
                yield _checked(file, formats, max_pixels)
        else:
            yield _checked(io.BytesIO(source) if isinstance(source, bytes) else source, formats, max_pixels)


@contextmanager
def _named_errors(name: str, formats: Sequence[str], max_pixels: int) -> Iterator[None]:
    """Any failure in the block becomes a UserError that starts with the image's name."""
    try:
        yield
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
        return _limited(addon.open(file), max_pixels)
    return _limited(Image.open(file, formats=tuple(formats or FORMATS)), max_pixels)


def _limited(image: Image.Image, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return image


def _reason(error: Exception, formats: Sequence[str], max_pixels: int) -> str:
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
        return f"not an image, or not of a format accepted here: {', '.join(formats)}"
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
        return orientation_in(image.getexif())
    except Exception:  # viewers ignore broken EXIF data
        return 1


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


#: Images with one side that many times the other are cropped and resized in one step, which may round differently.
ELONGATED = 16


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
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    resampling = Image.Resampling[interpolation.upper()]
    # 20,000 x 1 pixels would become five million x 256; and a small part of a very large image is seldom meant.
    if max(height, width) > ELONGATED * max(goal) or height * width > MAX_PIXELS:
        x, y = image.width / width, image.height / height
        part = (max(0.0, left * x), max(0.0, top * y), min(width, left + size[1]) * x, min(height, top + size[0]) * y)
        return np.asarray(image.resize((size[1], size[0]), resampling, box=part))
    image = image if image.size == (width, height) else image.resize((width, height), resampling)
    return np.asarray(image.crop((left, top, left + size[1], top + size[0])))
