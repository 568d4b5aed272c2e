"""What a data set of images is: numbered uint8 images, wherever they are kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from torch_emc2.data.decode import decode_image
from torch_emc2.data.errors import DataError
from torch_emc2.settings.images import Decoding

__all__ = ["ArrayImages", "FileImages", "ImageDataset", "ImageSource", "RecordImages", "identity"]


class ImageSource(Protocol):
    """Where images are kept, each uint8 (channels, h, w) with 1 or 3 channels."""

    channels: int

    def __len__(self) -> int: ...

    def read(self, row: int) -> Tensor:
        """Return an image."""

    def path(self, row: int) -> str | None:
        """Return the file that holds an image alone, if there is one."""


@runtime_checkable
class Encoded(ImageSource, Protocol):
    """Where images are kept as their files have them."""

    decoding: Decoding

    def decoded(self, decoding: Decoding) -> ImageSource:
        """Return the same images, decoded so."""


class ArrayImages:
    """Images in memory.

    Args:
        images: uint8 (n, c, h, w), c of 1 or 3.

    Raises:
        DataError: they are of another type or shape.
    """

    def __init__(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            shape, dtype = tuple(images.shape), images.dtype
            raise DataError(f"images must be uint8 of shape (n, 1 or 3, h, w), got {dtype} of shape {shape}")
        self.images = images
        self.channels = images.shape[1]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> Tensor:
        """Return an image, uint8 (c, h, w)."""
        return self.images[row]

    def path(self, row: int) -> str | None:
        """Return None: no file is behind a single image."""
        return None


class RecordImages:
    """Images of one size in one file of raw bytes, each stored as (3, width, height).

    Each read opens the file: the system's page cache serves all worker processes, and nothing large is copied to them.

    Args:
        file: the bytes.
        size: width and height.

    Raises:
        DataError: the file is cut short, or another.
    """

    channels = 3

    def __init__(self, file: Path, size: int) -> None:
        self.file, self.size = file, size
        self.record = 3 * size * size
        self.count, rest = divmod(file.stat().st_size, self.record)
        if rest:
            raise DataError(f"{str(file)!r} is cut short or not this data set; remove it and fetch it again")

    def __len__(self) -> int:
        return self.count

    def read(self, row: int) -> Tensor:
        """Return an image, uint8 (3, size, size)."""
        pixels = np.fromfile(self.file, dtype=np.uint8, count=self.record, offset=row * self.record)
        return torch.from_numpy(pixels).view(3, self.size, self.size).mT.contiguous()

    def path(self, row: int) -> str | None:
        """Return None: no file is behind a single image."""
        return None


class FileImages:
    """Images in a file each, decoded when they are read.

    Args:
        files: an image each.
        decoding: what is made of their pixels.
    """

    channels = 3

    def __init__(self, files: Sequence[str], decoding: Decoding = Decoding()) -> None:  # noqa: B008  # frozen
        self.files, self.decoding = files, decoding

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> Tensor:
        """Return an image, uint8 (3, h, w).

        Raises:
            BadImageError: it cannot be decoded.
        """
        return decode_image(self.files[row], self.decoding)

    def path(self, row: int) -> str | None:
        """Return the file of an image."""
        return self.files[row]

    def decoded(self, decoding: Decoding) -> FileImages:
        """Return the same images, decoded so."""
        return FileImages(self.files, decoding)


class ImageDataset:
    """Numbered images of one split, with labels where it has them.

    Args:
        source: where they are kept.
        rows: (n,) which of the source's they are, all by default.
        labels: int64 (n,), values that index ``classes``; None where there are none.
        classes: their names.
        channels: 1 or 3, what every image is converted to (grey is Rec. 601 luma); None keeps what the source has.

    Raises:
        DataError: another number of channels, or of labels than images.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        channels: int | None = None,
    ) -> None:
        if channels not in (None, 1, 3):
            raise DataError(f"channels must be 1 or 3, got {channels}")
        self.source = source
        self.rows = torch.arange(len(source)) if rows is None else rows
        self.labels = labels
        self.classes = list(classes)
        self.channels = channels or source.channels
        if labels is not None and len(labels) != len(self):
            raise DataError(f"{len(self)} images but {len(labels)} labels; give one label an image")

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Tensor:
        """Return image ``i``, uint8 (channels, h, w).

        Raises:
            BadImageError: its file cannot be decoded.
        """
        return _with_channels(self.source.read(int(self.rows[i])), self.channels)

    def path(self, i: int) -> str | None:
        """Return the file of image ``i``, None where it has none of its own."""
        return self.source.path(int(self.rows[i]))

    def files(self) -> list[str]:
        """Return the images' files, in order; none where they have none of their own."""
        return [path for i in range(len(self)) if (path := self.path(i)) is not None]

    @property
    def fingerprint(self) -> str:
        """What tells data of one name apart, beside files' names; empty where the name says all."""
        return getattr(self.source, "fingerprint", "")

    @property
    def decoding(self) -> Decoding | None:
        """How the images are decoded; None where they are pixels already."""
        return self.source.decoding if isinstance(self.source, Encoded) else None

    @property
    def in_files(self) -> bool:
        """Whether each image has a file of its own."""
        return isinstance(self.source, FileImages)

    def subset(self, picks: Tensor) -> ImageDataset:
        """Return the images numbered ``picks`` (k,), in that order."""
        return self._changed(rows=self.rows[picks], labels=None if self.labels is None else self.labels[picks])

    def without(self, files: Collection[str]) -> ImageDataset:
        """Return the images whose files are not among ``files``, numbered anew in order, as if those were not there."""
        paths = [self.path(i) for i in range(len(self))]
        picks = [i for i, path in enumerate(paths) if path not in files]
        if len(picks) == len(self):
            return self
        assert isinstance(self.source, FileImages)  # no other has files
        source = FileImages([str(paths[i]) for i in picks], self.source.decoding)
        kept = self.subset(torch.tensor(picks, dtype=torch.int64))
        return kept._changed(source=source, rows=torch.arange(len(picks)))

    def decoded(self, decoding: Decoding) -> ImageDataset:
        """Return the same images, decoded so if they are not yet."""
        return self._changed(source=self.source.decoded(decoding)) if isinstance(self.source, Encoded) else self

    def converted(self, channels: int) -> ImageDataset:
        """Return the same images with so many channels."""
        return self._changed(channels=channels)

    def _changed(self, **changes: Any) -> ImageDataset:
        names = ("source", "rows", "labels", "classes", "channels")
        return ImageDataset(**{name: getattr(self, name) for name in names} | changes)


def identity(images: ImageDataset) -> str:
    """Say what images these are: their number, and a hash of which of which data, and of files' names and sizes."""
    digest = hashlib.sha256(images.rows.numpy().tobytes() + images.fingerprint.encode())
    for i in range(len(images)):
        if (path := images.path(i)) is not None:
            with contextlib.suppress(OSError):  # unreadable, as decoding it will find
                digest.update(f"{os.path.basename(path)}\0{os.stat(path).st_size}\0".encode(errors="surrogateescape"))
    return f"{len(images)}, {digest.hexdigest()[:16]}"


def _with_channels(image: Tensor, channels: int) -> Tensor:
    if len(image) == channels:
        return image
    if channels == 3:
        return image.repeat(3, 1, 1)
    # Luma in Pillow's fixed point: the weights sum to 2^16, so grey stored as RGB comes back exactly.
    red, green, blue = image.int()
    luma: Tensor = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    return luma.to(torch.uint8)[None]
