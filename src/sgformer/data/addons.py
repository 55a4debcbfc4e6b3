"""Image formats that Pillow reads with the help of another package, which is used if it is installed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import IO, NamedTuple

from PIL import Image

# Brands of the container that HEIC files share with AVIF, which Pillow reads itself.
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL ")

#: Bytes at the beginning of a file that `addon_of` looks at.
HEAD = 64


class Addon(NamedTuple):
    """A package that adds a format to Pillow: the format, the package's class of images, its name for pip, and Pillow's
    name for the format."""

    format: str
    opener: str
    package: str
    known_as: str

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        try:
            return find_spec(self.opener.partition(".")[0]) is not None
        except ValueError:  # a module without a spec
            return False

    @property
    def advice(self) -> str:
        """What to do for these files to be read."""
        return f"{self.format} needs pip install {self.package}"

    def open(self, file: IO[bytes]) -> Image.Image:
        """Open a file with the installed package, which is not registered with Pillow: other programs in this process
        keep the formats that they chose."""
        module, _, name = self.opener.rpartition(".")
        return getattr(importlib.import_module(module), name)(file, "")


PILLOW_HEIF = Addon("HEIC", "pillow_heif.HeifImageFile", "pillow-heif", "HEIF")
PILLOW_JXL = Addon("JPEG XL", "pillow_jxl.JpegXLImagePlugin.JXLImageFile", "pillow-jxl-plugin", "JXL")

#: By extension, in lower case.
ADDONS = {".heic": PILLOW_HEIF, ".heif": PILLOW_HEIF, ".hif": PILLOW_HEIF, ".jxl": PILLOW_JXL}


def addon_of(head: bytes) -> Addon | None:
    """The package that a file needs, by its first bytes; None if Pillow reads it itself or nothing does."""
    if head[4:8] == b"ftyp" and head[8:12] in HEIC and b"avif" not in head:
        return PILLOW_HEIF
    return PILLOW_JXL if head.startswith(JPEG_XL) else None
