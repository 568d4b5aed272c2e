"""What can be set of images: which they are, how files become pixels, and pixels random views."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from PIL import ImageColor

__all__ = ["DATA_SETS", "Augmentation", "Decoding", "file_name_of", "parse_range", "require_data", "shorter_side"]

DATA_SETS = ("digits", "fashion-mnist", "cifar10", "stl10", "imagenet100")


def require_data(name: str) -> None:
    """Raise ValueError for what can be no data set's name, and for a folder that is not there."""
    if name.startswith("folder:"):
        path = os.path.expanduser(name.removeprefix("folder:"))
        if not os.path.isdir(path):  # Path's own raises where the name is too long
            here = "" if os.path.isabs(path) else f" here, in {os.getcwd()}"
            raise ValueError(f"{path!r} is not a folder{here}; give one that holds images, folder:PATH")
    elif name not in DATA_SETS and not name.startswith("hf:"):
        if os.path.isdir(os.path.expanduser(name)):
            raise ValueError(f"unknown data set {name!r}; a folder of images is {shlex.quote(f'folder:{name}')}")
        raise ValueError(f"unknown data set {name!r}; use one of {', '.join(DATA_SETS)}, folder:PATH, hf:OWNER/NAME")


def file_name_of(name: str) -> str:
    """Return a short name for files on a data set, which differs where folders or owners alone do."""
    kind, colon, place = name.partition(":")
    if not colon:
        return name
    if kind == "folder" or os.path.isdir(os.path.expanduser(place)):
        place = os.path.abspath(os.path.expanduser(place))
    plain = re.sub(r"[^\w.-]+", "-", os.path.basename(place), flags=re.ASCII)[:40]
    return f"{plain}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:6]}"


@dataclass(frozen=True)
class Augmentation:
    """How random views are drawn, in this order; the defaults are those of STL-10.

    Mean and standard deviation are not normalised: what a pretrained encoder needs is a part of it. Grey images (one
    channel) know no saturation, hue or greying.

    Attributes:
        size: of a view, in pixels.
        crop_scale: least and largest share of the image's area that is cut out and resized.
        flip: probability of a mirror image.
        jitter: largest change of brightness, contrast and saturation, as shares, and of hue, of a full turn.
        jitter_p: probability of a jitter.
        grey_p: probability that colours go.
        blur_p: probability of a blur.
        blur_sigma: least and largest, in pixels; the kernel is a tenth of the size wide.

    Raises:
        ValueError: a value that no view can be drawn with.
    """

    size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 1.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"size must be at least 2 pixels, got {self.size}")
        for name in ("flip", "jitter_p", "grey_p", "blur_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be 0 < min <= max <= 1, got {self.crop_scale}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be 0 < min <= max, got {self.blur_sigma}")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter must not be negative, and its hue at most 0.5, got {self.jitter}")

    @property
    def blur_width(self) -> int:
        """Of the kernel, in pixels."""
        return max(3, self.size // 10 | 1)


@dataclass(frozen=True)
class Decoding:
    """What is made of a file's pixels: plain 8-bit colours, of no more of them than are needed.

    Attributes:
        background: the colour behind transparent pixels, as Pillow names it.
        value_range: the values that become black and white, as ``min,max``, or as ``low%,high%`` of each image's own,
            where integers are deeper than 8 bits, or floating-point. None: 16 bits that fill their range.
        max_pixels: larger images are refused before they take memory.
        shrink_to: the shorter side of larger images, in pixels, as they are shrunk to; None: as they are.

    Raises:
        ValueError: a value that none of that can be made with.
    """

    background: str = "white"
    value_range: str | None = None
    max_pixels: int = 2**26
    shrink_to: int | None = None

    def __post_init__(self) -> None:
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except (AttributeError, ValueError):
            opaque = False
        if not opaque:
            raise ValueError(f"background must be a colour, such as white or #808080, got {self.background!r}")
        if self.value_range is not None:
            parse_range(self.value_range)
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {self.max_pixels}")
        if self.shrink_to is not None and self.shrink_to < 1:
            raise ValueError(f"shrink_to must be at least 1 pixel, or None for all of them, got {self.shrink_to}")

    @property
    def fields(self) -> dict[str, Any]:
        """All that pixels depend on; what came later only where it is set: files named by a hash of it stay valid."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("shrink_to", None)}

    def shrunk(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height in which an image is read."""
        if self.shrink_to is None or min(width, height) <= self.shrink_to:
            return width, height
        share = self.shrink_to / min(width, height)
        return round(width * share), round(height * share)


def shorter_side(size: int) -> int | None:
    """Return what an image's shorter side is made before its middle is cut out to be embedded.

    None up to 64 pixels, where the whole image is resized to a square.
    """
    return None if size <= 64 else round(size * 256 / 224)


def parse_range(value_range: str) -> tuple[float, float, bool]:
    """Return the lowest and the highest value, and whether they are percentiles of each image."""
    number = r"([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
    found = re.fullmatch(rf"\s*{number}(%?)\s*,\s*{number}(%?)\s*", value_range)
    if found:
        low, high, of_each = float(found[1]), float(found[3]), bool(found[2])
        if bool(found[4]) == of_each and low < high and (not of_each or (low >= 0 and high <= 100)):
            return low, high, of_each
    raise ValueError(f"value_range must be as 0,4095 or 1%,99%, the lower value first, got {value_range!r}")
