"""Image formats that Pillow reads with the help of another package, which is used if it is installed."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

# Brands of the container that HEIC files share with AVIF, which Pillow reads itself.
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL ")

#: Bytes at the beginning of a file that `addon_of` looks at.
HEAD = 64


class Addon(NamedTuple):
    """A package that adds a format to Pillow: the format, the module, the name for pip."""

    format: str
    module: str
    package: str

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        try:
            return find_spec(self.module) is not None
        except ValueError:  # a module without a spec
            return False

    @property
    def advice(self) -> str:
        """What to do for these files to be read."""
        return f"{self.format} needs pip install {self.package}"


PILLOW_HEIF = Addon("HEIC", "pillow_heif", "pillow-heif")
PILLOW_JXL = Addon("JPEG XL", "pillow_jxl", "pillow-jxl-plugin")

#: By extension, in lower case.
ADDONS = {".heic": PILLOW_HEIF, ".heif": PILLOW_HEIF, ".hif": PILLOW_HEIF, ".jxl": PILLOW_JXL}


def addon_of(head: bytes) -> Addon | None:
    """The package that a file needs, by its first bytes; None if Pillow reads it itself or nothing does."""
    if head[4:8] == b"ftyp" and head[8:12] in HEIC and b"avif" not in head:
        return PILLOW_HEIF
    return PILLOW_JXL if head.startswith(JPEG_XL) else None


@cache
def activate(addon: Addon) -> None:
    """Let Pillow read an installed package's format."""
    module = importlib.import_module(addon.module)
    if register := getattr(module, "register_heif_opener", None):  # the other registers itself
        register()
