"""Embedded images with their names: what is searched, grouped and drawn."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_emc2.data import BadImageError, ImageDataset, decode_image
from torch_emc2.runs.finished import leave_out_advised
from torch_emc2.runs.model import Model
from torch_emc2.runs.table import EmbeddingTable, read_table
from torch_emc2.settings.images import Decoding
from torch_emc2.training.run_images import readable_images

__all__ = ["Gallery", "of_images", "of_run", "of_table", "open_gallery", "refuse_images_name"]

_LOG = logging.getLogger(__name__)

# To be looked at only: values of an unknown range show what there is.
_ANY_RANGE = Decoding(value_range="1%,99%")


@dataclass(frozen=True)
class Gallery:
    """Embedded images.

    Attributes:
        embeddings: float32 (n, d).
        names: n files, or data set and number.
        labels: n classes; None where there is none.
        read: gives image i, uint8 (c, h, w).
    """

    embeddings: Tensor
    names: Sequence[str]
    labels: Sequence[str | None]
    read: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> Tensor | None:
        """Return image ``i`` to be drawn; None where it cannot be read any more."""
        try:
            return self.read(i)
        except BadImageError:
            return None

    def subset(self, picks: Tensor) -> Gallery:
        """Return the images numbered ``picks`` (k,), in that order."""
        rows = picks.tolist()
        names, labels = ([each[i] for i in rows] for each in (self.names, self.labels))
        return Gallery(self.embeddings[picks], names, labels, lambda i: self.read(rows[i]))


def of_images(images: ImageDataset, embeddings: Tensor, name: str) -> Gallery:
    """Give a data set's images, embedded; those in no files are known by a name and their numbers."""
    rows = images.rows.tolist()
    names = [images.path(i) or f"{name} {row}" for i, row in enumerate(rows)]
    classes = [None if name == "." else name for name in images.classes]  # which lie in no folder of their own
    labels = [None] * len(rows) if images.labels is None else [classes[c] for c in images.labels.tolist()]
    return Gallery(embeddings, names, labels, images.image)


def of_run(model: Model) -> Gallery:
    """Give the images that a run was trained on, embedded by its model."""
    images = readable_images(model.config, model.run)
    with leave_out_advised(model.run):
        return of_images(images, model.features(images), model.config.data.name)


def of_table(table: EmbeddingTable, name: Path) -> Gallery:
    """Give the images of a table whose files are there; where none is, all of them, by their names alone."""
    paths = table.paths
    if not paths:
        raise ValueError(f"{name} has no images: add some by emc2 embed --append")
    gallery = Gallery(
        table.embeddings,
        [_from_here(path) for path in paths],
        table.labels,
        lambda i: decode_image(paths[i], _ANY_RANGE),
    )
    there = torch.tensor([os.path.exists(path) for path in paths], dtype=torch.bool)
    gone = len(paths) - int(there.sum())
    if gone and gone == len(paths):
        _LOG.warning("%s: none of its %d files is there (%s, …); names are all there is", name, gone, paths[0])
        return gallery
    if gone:
        first = paths[int(there.int().argmin())]
        _LOG.warning(
            "%s: %d of its %d files are not there any more, and left out (%s, …)", name, gone, len(paths), first
        )
        return gallery.subset(there.nonzero()[:, 0])
    return gallery


def _from_here(path: str) -> str:
    """A file's name as one would type it: relative where it is below the working directory."""
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return path if relative.split(os.sep)[0] == os.pardir else relative


def refuse_images_name(out: Path, *galleries: Gallery) -> None:
    """Raise ValueError where a picture would take the place of one of the images that it shows."""
    if out.exists() and any(
        os.path.realpath(name) == os.path.realpath(out) for each in galleries for name in each.names
    ):
        raise ValueError(f"{out} is one of the images themselves: give the picture another name by -o")


def open_gallery(source: Path) -> Gallery:
    """Give the images of a table, or those that a run was trained on.

    Raises:
        ValueError: it is neither.
    """
    return of_table(read_table(source), source) if source.is_file() else of_run(Model(source))
