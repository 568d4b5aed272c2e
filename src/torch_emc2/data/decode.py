"""From an image file to 8-bit RGB: by its content, upright, on a background, in a known range."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import cache
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from torch_emc2.data.errors import BadImageError, DataError
from torch_emc2.error_text import one_line
from torch_emc2.settings.images import Decoding, parse_range

__all__ = [
    "FULL_16_BIT",
    "Depth",
    "decode",
    "decode_image",
    "depth_of",
    "formats",
    "heif_bytes",
    "image_pixels",
    "no_range",
    "open_image",
    "refusal",
    "require_finite",
]

FULL_16_BIT = "0,65535"

# Opened by other programs, or known to Pillow by name alone.
_NOT_BY_PILLOW = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


class Depth(NamedTuple):
    """What an opened file tells of values deeper than 8 bits.

    Attributes:
        kind: in words.
        top: the largest value; None where there may be any.
        colour: Pillow keeps the upper 8 bits.
        scaled: to 16 bits, by Pillow, from the range that the file names.
    """

    kind: str
    top: int | None
    colour: bool = False
    scaled: bool = False


def decode_image(path: str | os.PathLike[str], decoding: Decoding = Decoding()) -> Tensor:  # noqa: B008  # frozen
    """Return the first frame of an image file as RGB, uint8 (3, h, w), turned upright as its EXIF says.

    Raises:
        BadImageError: it cannot be read, is too large, or its values have no known range.
    """
    try:
        return decode(path, decoding)
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes of them, struct.error included
        raise BadImageError(f"cannot read image {os.fspath(path)!r} ({refusal(path, error)})") from error


def decode(path: str | os.PathLike[str] | IO[bytes], decoding: Decoding) -> Tensor:
    """Do, also of an open file, what `decode_image` does, with errors as they come; `refusal` has them in words."""
    with open_image(path, decoding) as file:
        depth, raw = depth_of(file), _raw_mode(file)
        size = decoding.shrunk(*file.size)
        if size != file.size:
            file.draft(None, size)  # a JPEG is decoded at a half, a quarter or an eighth, no smaller than that
        before = file.size
        ImageOps.exif_transpose(file, in_place=True)
        if file.size != before:  # turned by a quarter; a TIFF's was so from the start
            size = size[::-1]
        return _pixels(file, depth, raw, decoding, size)


def image_pixels(image: Image.Image, decoding: Decoding) -> Tensor:
    """Return what `decode_image` makes of an image that Pillow has opened or made; it stays as it is.

    A JPEG that is shrunk differs by a little: here from all its pixels, there from those of a smaller decoding.
    """
    depth, raw = depth_of(image), _raw_mode(image)  # which a copy does not tell
    upright = ImageOps.exif_transpose(image)
    return _pixels(upright, depth, raw, decoding, decoding.shrunk(*upright.size))


def _pixels(file: Image.Image, depth: Depth | None, raw: str, decoding: Decoding, size: tuple[int, int]) -> Tensor:
    """Return an upright image as RGB, uint8 (3, h, w), of a width and height; it may be changed."""
    _scale_transparent_grey(file, raw)
    image = file if depth is None else _eight_bit(file, depth, decoding.value_range)
    flat = _flat(image, decoding.background)
    if size != flat.size:
        flat = flat.resize(size, Image.Resampling.BICUBIC)  # of all pixels below, not of some: no moiré
    pixels = torch.from_numpy(np.asarray(flat))
    return pixels.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def open_image(
    path: str | os.PathLike[str] | IO[bytes], decoding: Decoding, kinds: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """Open an image by its content, of all `formats` or these ``kinds``; its header alone is read.

    Raises:
        DataError: it is too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it repairs
        pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our limit is in its place
        try:
            file = Image.open(path, formats=kinds or formats())
        finally:
            Image.MAX_IMAGE_PIXELS = pillows
        with file:
            if file.width * file.height > decoding.max_pixels:
                raise DataError(f"{file.width} x {file.height} pixels are more than max_pixels, {decoding.max_pixels}")
            yield file


@cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of what it can open here by itself; HEIC is among them where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]

        register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_BY_PILLOW)


def heif_bytes(start: bytes) -> bool:
    """Tell whether a file that starts so is HEIC."""
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS


def refusal(path: str | os.PathLike[str], error: Exception) -> str:
    """Say why a file cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start = file.read(12)
            if heif_bytes(start):
                return "HEIC, which Pillow opens after: python -m pip install pillow-heif"
            return "of no kind that Pillow opens here" if start else "empty"
    return str(error) if isinstance(error, DataError) else one_line(error)


def depth_of(file: Image.Image) -> Depth | None:
    """Return what is known of an opened image's values, None for 8 bits and less; nothing is decoded."""
    if file.mode == "F":
        return Depth("floating-point", None)
    if file.mode == "I":
        return Depth("16-bit", 65535, scaled=True) if file.format == "PPM" else Depth("32-bit or signed", None)
    if file.mode.startswith("I;16"):
        return Depth("16-bit", 65535)
    if _raw_mode(file).endswith((";16B", ";16L", ";16N")):
        return Depth("16-bit colour", 65535, colour=True)
    return None


def _raw_mode(file: Image.Image) -> str:
    """Say how the file has the pixels, in Pillow's words."""
    for tile in getattr(file, "tile", ()):
        first = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
        return first if isinstance(first, str) else ""
    return ""


def _scale_transparent_grey(file: Image.Image, raw: str) -> None:
    """Name the transparent grey of a PNG of 2 or 4 bits as its pixels will be: Pillow scales them, and not it."""
    scale = {"L;2": 85, "L;4": 17}.get(raw)
    if scale is not None and isinstance(file.info.get("transparency"), int):
        file.info["transparency"] *= scale


def _eight_bit(image: Image.Image, depth: Depth, value_range: str | None) -> Image.Image:
    """Scale deep values to 8 bits, where Pillow's own conversion would clip them to white."""
    if depth.colour:
        if "transparency" in image.info:
            raise DataError("one of its 16-bit colours is transparent, Pillow keeps 8 bits: give it an alpha channel")
        if value_range not in (None, FULL_16_BIT):
            raise DataError("of 16-bit colour Pillow keeps the upper 8 bits: scale it to 8 bits for another range")
        if value_range is None:
            opaque = np.asarray(image.convert("RGB"))
            _require_full(depth, 257 * int(opaque.min()), 257 * int(opaque.max()))
        return image
    values = np.asarray(image).astype(np.float64)
    require_finite(values)
    if value_range is None and not depth.scaled:
        _require_full(depth, values.min(), values.max())
    if value_range is None or depth.scaled:
        value_range = FULL_16_BIT
    low, high, of_each = parse_range(value_range)
    if of_each:
        low, high = np.percentile(values, (low, high))
    scaled = Image.fromarray(np.rint((values.clip(low, high) - low) * (255 / ((high - low) or 1))).astype(np.uint8))
    if "transparency" in image.info:  # the value that is
        scaled.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled


def require_finite(values: np.ndarray) -> None:
    """Raise DataError where a value is NaN or infinite: no range has it."""
    if not np.isfinite(values).all():
        raise DataError("it has values that are not finite")


def _require_full(depth: Depth, least: float, most: float) -> None:
    if depth.top is None or most <= depth.top // 2:
        raise DataError(no_range(depth.kind, least, most))


def no_range(kind: str, least: float, most: float) -> str:
    """Say that values have no known range."""
    return f"{kind} values from {least:g} to {most:g} have no known range: value_range gives one"


def _flat(image: Image.Image, background: str) -> Image.Image:
    """Return the image as RGB, with the background where it is transparent."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image)  # rounds c·a + b·(1 - a) to the nearest integer
    return canvas
