"""Image files without their metadata, which Pillow may fail on although no pixel depends on them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

ORIENTATION = 0x0112
PNG = b"\x89PNG\r\n\x1a\n"
EXIF = b"Exif\0\0"


def orientation_in(tags: Mapping[int, object]) -> int:
    """The EXIF orientation, 1 to 8; 1 if missing or unreadable."""
    value: Any = tags.get(ORIENTATION, 1)
    value = value[0] if isinstance(value, tuple) and value else value  # some programs write a list, or a fraction
    try:
        return int(value) if 1 <= int(value) <= 8 else 1
    except (TypeError, ValueError, ArithmeticError):
        return 1


def without_metadata(content: bytes) -> bytes | None:
    """A JPEG or PNG file reduced to its pixels, its transparency and its orientation; None for any other."""
    parts = _jpeg(content) if content.startswith(b"\xff\xd8\xff") else _png(content) if content[:8] == PNG else ()
    return b"".join(parts) or None


def _jpeg(content: bytes) -> Iterator[bytes]:
    """Without comments and segments of applications, but for those that tell the colours, if libjpeg takes them."""
    yield content[:2]
    at, exif = 2, b""
    while content[at : at + 1] == b"\xff" and len(content) >= at + 4:
        marker = content[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:  # pixels from here on
            break
        segment = content[at : at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")]
        body = segment[4:]
        of_application = 0xE0 <= marker <= 0xEF or marker == 0xFE
        colours = (marker == 0xE0 and len(body) >= 14) or (marker == 0xEE and len(body) >= 12)
        xmp = marker == 0xE1 and b"adobe.com/xap" in body[:32]
        if marker == 0xE1 and body.startswith(EXIF):
            exif += body[len(EXIF) :]
        elif colours or xmp or not of_application:
            yield segment
        at += len(segment)
    yield _orientation_alone(exif)
    yield content[at:]


def _orientation_alone(exif: bytes) -> bytes:
    """A JPEG segment with the orientation of EXIF data, or nothing if that is missing or upright."""
    tags, alone = Image.Exif(), Image.Exif()
    try:
        tags.load(EXIF + exif)
        alone[ORIENTATION] = orientation_in(tags)
    except Exception:  # viewers ignore broken EXIF data
        return b""
    body = alone.tobytes()
    return b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body if alone[ORIENTATION] != 1 else b""


def _png(content: bytes) -> Iterator[bytes]:
    """Without ancillary chunks, but for transparency and sound EXIF data."""
    yield content[:8]
    at = 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        chunk, kind = content[at:end], content[at + 4 : at + 8]
        sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if not kind[:1].islower() or kind == b"tRNS" or (kind == b"eXIf" and sound):
            yield chunk
        at = end
