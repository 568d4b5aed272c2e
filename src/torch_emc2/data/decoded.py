"""Images in files, decoded once: a memory-mapped file has their pixels."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from torch_emc2.data.decode import open_image
from torch_emc2.data.errors import BadImageError
from torch_emc2.data.images import ImageDataset
from torch_emc2.data.kept import keep, which
from torch_emc2.files import whole_file
from torch_emc2.seeds import own_generator

__all__ = ["decoded_once"]

_LOG = logging.getLogger(__name__)


class _DecodedImages:
    """Images one after the other in a file of raw bytes.

    Args:
        file: the bytes.
        shapes: (c, h, w) of each.
        paths: the files that they are from.
        unreadable: why some could not be decoded; they have no bytes.
    """

    def __init__(
        self, file: Path, shapes: Sequence[Sequence[int]], paths: Sequence[str | None], unreadable: Mapping[int, str]
    ) -> None:
        self.file, self.shapes, self.paths, self.unreadable = file, shapes, paths, unreadable
        self.channels = max((shape[0] for shape in shapes), default=0)
        self.ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        if file.stat().st_size != self.ends[-1]:
            raise ValueError("it is cut short")
        self._pixels = np.memmap(file, np.uint8, "r") if self.ends[-1] else np.empty(0, np.uint8)

    def __reduce__(self) -> Any:
        return _DecodedImages, (self.file, self.shapes, self.paths, self.unreadable)

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, row: int) -> Tensor:
        """Return an image, uint8 (c, h, w).

        Raises:
            BadImageError: it could not be decoded.
        """
        if row in self.unreadable:
            raise BadImageError(self.unreadable[row])
        end = self.ends[row]
        pixels = self._pixels[end - np.prod(self.shapes[row]) : end]
        return torch.from_numpy(pixels.copy()).view(*self.shapes[row])

    def path(self, row: int) -> str | None:
        """Return the file of an image."""
        return self.paths[row]


def decoded_once(
    images: ImageDataset,
    *,
    folder: Path,
    on_bad_image: Literal["raise", "skip"] = "raise",
    num_workers: int = 0,
) -> ImageDataset:
    """Return the same images with their pixels in a memory-mapped file; made unless the folder has it whole.

    Its name is a hash of the files' paths, sizes and times, of their decoding and of the channels. Images that are in
    no files of their own are returned as they are, and so are those that the disk has no room for, which is logged.

    Args:
        images: m of them.
        folder: where files of pixels are kept.
        on_bad_image: stop at an unreadable one, or leave it out and name it when it is read.
        num_workers: processes that decode.

    Raises:
        BadImageError: an image cannot be read, and is not to be skipped.
    """
    if not images.in_files or images.decoding is None:
        return images
    origin = {"which": which(images), "channels": images.channels, "decoding": images.decoding.fields}
    paths = [images.path(i) for i in range(len(images))]
    source = keep(
        folder, origin, ".pixels", partial(_open, paths=paths), partial(_make, images, paths, origin, num_workers)
    )
    if source is None:
        return images
    if source.unreadable and on_bad_image == "raise":
        raise BadImageError(next(iter(source.unreadable.values())))
    return ImageDataset(source, labels=images.labels, classes=images.classes, channels=images.channels)


def _open(file: Path, paths: Sequence[str | None]) -> _DecodedImages | None:
    """Open the pixels in a file; None where it is missing, cut short or damaged."""
    try:
        note = json.loads(file.with_suffix(".json").read_text())
        unreadable = {int(row): why for row, why in note["unreadable"].items()}
        return _DecodedImages(file, note["shapes"], paths, unreadable)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _make(
    images: ImageDataset, paths: Sequence[str | None], origin: Mapping[str, Any], num_workers: int, file: Path
) -> _DecodedImages | None:
    """Decode all images into a file; None, and a line in the log, where there is no room for it."""
    needed, free = _bytes(images, paths), shutil.disk_usage(file.parent).free
    if needed > free:
        _LOG.info(
            "%d images take %.2f GB decoded, %r has %.2f GB free: they are decoded each time",
            len(images),
            needed / 1e9,
            str(file.parent),
            free / 1e9,
        )
        return None
    # A generator of its own: a loader seeds its workers with a draw from torch's.
    loader = DataLoader(_Decoding(images), batch_size=None, num_workers=num_workers, generator=own_generator())
    shapes, unreadable = [], {}
    with whole_file(file) as partial_file:
        with partial_file.open("wb") as out:  # not through a memory map: on a full disk that kills the process
            for row, pixels in enumerate(tqdm(loader, "Decoding images", leave=False, disable=None)):
                if isinstance(pixels, str):
                    unreadable[row] = pixels
                    pixels = torch.empty(images.channels, 0, 0, dtype=torch.uint8)
                shapes.append(tuple(pixels.shape))
                out.write(pixels.numpy().data)
        with whole_file(file.with_suffix(".json")) as note:
            note.write_text(json.dumps({**origin, "shapes": shapes, "unreadable": unreadable}) + "\n")
    return _DecodedImages(file, shapes, paths, unreadable)


def _bytes(images: ImageDataset, paths: Sequence[str | None]) -> int:
    """Return how much all pixels take, by the files' headers."""
    assert images.decoding is not None
    pixels = 0
    for path in paths:
        with contextlib.suppress(Exception), open_image(str(path), images.decoding) as file:  # unreadable: no pixels
            width, height = images.decoding.shrunk(*file.size)
            pixels += width * height
    return pixels * images.channels


class _Decoding(Dataset[Tensor | str]):
    """An image, or why it cannot be read."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            return self.images.image(i).contiguous()
        except BadImageError as bad:
            return str(bad)
