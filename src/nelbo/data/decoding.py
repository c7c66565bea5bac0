"""One image file to its levels: the only module that knows Pillow.

Whatever changes a pixel's value is counted: a turn by EXIF orientation, conversion from palette or
CMYK, transparency flattened on black, reduction from 16 bits, crop and resize. A file that cannot
be decoded to its last byte is refused, as is one whose 16 bits per channel would be lost.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL import __version__ as PIL_VERSION

from nelbo.data.files import existing_file, reading
from nelbo.errors import InputRefused

PILLOW = PIL_VERSION
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
BITS_PER_SAMPLE = 258
ORIENTATION = 0x0112
DECODING = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class Picture(NamedTuple):
    """One decoded file.

    Arguments:
        pixels: (H, W) or (H, W, 3) uint8. key: SHA-256 of the file. done: the conversions.
    """

    pixels: np.ndarray
    key: bytes
    done: tuple[str, ...]


@dataclass
class Reader:
    """How files become arrays, and the count of what was done to them.

    Arguments:
        size: (H, W) to crop and resize to, or None.
        channels: 1, 3, or None for each file's own.
        reduce_16bit: keep the upper 8 of 16 bits instead of refusing.
        pixel_limit: most pixels that a file may declare.
        conversions: examples by conversion.
    """

    size: tuple[int, int] | None
    channels: int | None
    reduce_16bit: bool
    pixel_limit: int
    conversions: dict[str, int] = field(default_factory=dict)

    def read(self, path: Path) -> tuple[np.ndarray, bytes]:
        """Pixels (H, W) or (H, W, 3) uint8, and the SHA-256 of the file; what was done is counted.

        Raises:
            InputRefused: see `images`.
        """
        with strict_decoding():
            picture = self.decode(file_bytes(path), str(path))
        self.count(picture.done)
        return picture.pixels, picture.key

    def decode(self, data: bytes, name: str) -> Picture:
        """A file's bytes to pixels; from any thread, inside of `strict_decoding`.

        Arguments:
            name: what messages call the file.

        Raises:
            InputRefused: see `images`.
        """
        done: list[str] = []
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                self._check(image, data, name, done)
                image.load()
                pixels = np.asarray(self._fit(self._plain(image, name, done), done))
        except InputRefused:
            raise
        except DECODING as error:
            raise InputRefused(
                f"{name}: cannot be decoded as an image ({_reason(error)}); replace it or take it "
                "out of the folder, or allow bad files to be skipped"
            ) from error
        return Picture(pixels, hashlib.sha256(data).digest(), tuple(done))

    def again(self, data: bytes, name: str, key: bytes, plain: bool) -> np.ndarray:
        """Pixels of a file that was decoded before, if it is that file to the last byte.

        What was checked then need not be checked again, and where nothing was done to the pixels
        (`plain`) they are what Pillow gives.

        Raises:
            InputRefused: another file has its name now.
        """
        if hashlib.sha256(data).digest() != key:
            raise InputRefused(
                f"{name}: is not the file that was read at the start (its SHA-256 differs); put "
                "the old one back, or start a new run"
            )
        if not plain:
            return self.decode(data, name).pixels
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        # what np.asarray gives, without the detour over its interface
        flat = np.frombuffer(image.tobytes(), np.uint8)
        shape = (image.height, image.width)
        return flat.reshape(shape if len(flat) == shape[0] * shape[1] else (*shape, 3))

    def count(self, done: Iterable[str]) -> None:
        """Add to the conversions."""
        for step in done:
            self.conversions[step] = self.conversions.get(step, 0) + 1

    def _check(self, image: Image.Image, data: bytes, path: str, done: list[str]) -> None:
        """What the header tells, before any pixel is decoded."""
        pixels = image.width * image.height
        if pixels > self.pixel_limit:
            raise InputRefused(
                f"{path}: declares {image.width} x {image.height} = {pixels:,} pixels, above the "
                f"limit of {self.pixel_limit:,} (a decompression bomb?); shrink it or take it out"
            )
        if _bits(image, data) > 8 and image.mode not in ("I", "F"):
            if not self.reduce_16bit:
                raise InputRefused(
                    f"{path}: has 16 bits per channel; reading it would reduce 65,536 levels to "
                    "256 and change what bits/dim mean. Convert it to 8 bits, or allow the "
                    "reduction (reduce_16bit)"
                )
            done.append("16 bits reduced to the upper 8")
        if getattr(image, "n_frames", 1) > 1:
            done.append("first of several frames")
        if "icc_profile" in image.info:
            done.append("colour profile ignored")

    def _plain(self, image: Image.Image, path: str, done: list[str]) -> Image.Image:
        """Upright, grey or RGB, without transparency, in the wanted number of channels."""
        if image.getexif().get(ORIENTATION, 1) != 1:
            done.append("turned by EXIF orientation")
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            if image.has_transparency_data:
                done.append("transparent colour ignored")
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = _flattened(image, done)
        if image.mode in ("P", "CMYK", "YCbCr"):
            done.append(f"{'palette' if image.mode == 'P' else image.mode} to RGB")
            image = image.convert("RGB")
        if image.mode == "1":
            done.append("1 bit to levels 0 and 255")
            image = image.convert("L")
        if image.mode not in ("L", "RGB"):
            raise InputRefused(
                f"{path}: has pixels of type {image.mode}, which have no 8-bit levels; convert it "
                "to 8-bit grey or RGB"
            )
        return self._in_channels(image, done)

    def _in_channels(self, image: Image.Image, done: list[str]) -> Image.Image:
        mode = {1: "L", 3: "RGB", None: image.mode}[self.channels]
        if mode == image.mode:
            return image
        done.append("grey to RGB" if mode == "RGB" else "RGB to grey")
        return image.convert(mode)

    def _fit(self, image: Image.Image, done: list[str]) -> Image.Image:
        """The largest centred rectangle of the wanted aspect, resized with Lanczos' filter.

        Pillow widens the filter when it shrinks, so that nothing aliases.
        """
        if self.size is None or (image.height, image.width) == self.size:
            return image
        height, width = self.size
        share = min(image.width / width, image.height / height)
        left, top = (image.width - share * width) / 2, (image.height - share * height) / 2
        box = (left, top, left + share * width, top + share * height)
        done.append("enlarged" if share < 1 else "cropped or shrunk")
        return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def file_bytes(path: str | Path) -> bytes:
    """All bytes of a file.

    Raises:
        InputRefused: there is none, it is empty or cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError:
        data = b""
    if not data:  # ask again, to say what is wrong
        path = existing_file(path)
        with reading(path):
            data = path.read_bytes()
    return data


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Pillow's bomb warning is an error, and truncated files are never padded."""
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel by the file's header; Pillow reads 16-bit RGB as 8-bit without a word."""
    if image.format == "PNG":
        return data[24]
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    return 8 if tags is None else max(tags.get(BITS_PER_SAMPLE, (8,)))


def _flattened(image: Image.Image, done: list[str]) -> Image.Image:
    """Opaque, on black, with colours weighted by alpha: those under alpha 0 do not show."""
    grey = image.mode in ("L", "LA", "La", "1")
    full = image.convert("RGBA")
    opaque = full.getchannel("A").getextrema()[0] == 255
    done.append("opaque alpha channel dropped" if opaque else "transparency flattened on black")
    black = Image.new("RGBA", full.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, full).convert("L" if grey else "RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(FORMATS)}"
    return str(error) or type(error).__name__
