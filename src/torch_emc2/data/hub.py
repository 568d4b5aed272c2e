"""Data sets of Hugging Face's library `datasets`: on the hub, or in a folder."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_emc2.data.decode import decode
from torch_emc2.data.errors import DataError
from torch_emc2.data.folders import NO_TEST_PART, part_of
from torch_emc2.data.images import ImageDataset
from torch_emc2.error_text import one_line
from torch_emc2.settings.images import Decoding

__all__ = ["HubData", "HubImages", "read_hub"]


class HubImages:
    """The images of a table of `datasets`, decoded when they are read, as those in files are.

    Args:
        table: a `datasets.Dataset`.
        column: of it that has the images, as bytes or paths.
        name: of the data, for errors.
        fingerprint: by which `datasets` tells one content from another.
        decoding: what is made of their pixels.
    """

    channels = 3

    def __init__(
        self,
        table: Any,
        column: str,
        name: str,
        fingerprint: str,
        decoding: Decoding = Decoding(),  # noqa: B008  # frozen
    ) -> None:
        self.table, self.column, self.name = table, column, name
        self.fingerprint, self.decoding = fingerprint, decoding

    def __len__(self) -> int:
        return len(self.table)

    def read(self, row: int) -> Tensor:
        """Return an image, uint8 (3, h, w).

        Raises:
            DataError: it cannot be decoded.
        """
        cell = self.table[row][self.column]
        try:
            if cell is None:
                raise DataError("there is none")
            return decode(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]), self.decoding)
        except Exception as error:  # Pillow's parsers raise whatever a damaged file makes of them
            why = str(error) if isinstance(error, DataError) else one_line(error)
            raise DataError(
                f"cannot read image {row} of {self.name} ({why}): mend it, or leave it out of the data and begin anew"
            ) from error

    def path(self, row: int) -> str | None:
        """Return None: no file is behind a single image."""
        return None

    def decoded(self, decoding: Decoding) -> HubImages:
        """Return the same images, decoded so."""
        return HubImages(self.table, self.column, self.name, self.fingerprint, decoding)


@dataclass(frozen=True)
class HubData:
    """A data set with its splits.

    Attributes:
        name: as it was given.
        train: its images to train on.
        held_out: those never to be trained on; None where it has no such split.
        left_out: names of splits that are used for nothing.
    """

    name: str
    train: ImageDataset
    held_out: ImageDataset | None
    left_out: Sequence[str]

    def __str__(self) -> str:
        """What was understood, in a few sentences."""
        classes = f"{len(self.train.classes)} classes" if self.train.labels is not None else "no labels"
        said = [f"{self.name}: {len(self.train)} training images, {classes}."]
        if self.held_out is not None:
            said.append(f"Held out, to test on: {len(self.held_out)}.")
        elif self.train.labels is not None:
            said.append(NO_TEST_PART)
        if self.left_out:
            said.append(f"Left out: {', '.join(map(repr, self.left_out))}.")
        return " ".join(said)


def read_hub(name: str) -> HubData:
    """Find a data set's images, splits and classes.

    Images are those of the column ``image``, or of the first that has images; classes those of the first `ClassLabel`.
    Splits are known by their usual names, as those of folders are; of a test and a validation part the first that has
    labels tests.

    Args:
        name: hf:OWNER/NAME of the hub, or hf:PATH of a folder that `Dataset.save_to_disk` wrote or that
            `datasets.load_dataset` understands.

    Raises:
        DataError: `datasets` is not installed, or finds no such data, or there are no images in it.
    """
    tables = _load(name)
    parts: dict[str, str] = {}
    for split in tables:
        parts.setdefault(part_of(split) or "", split)
    if "train" not in parts:
        if len(tables) > 1:
            raise DataError(f"{name} has the splits {', '.join(map(repr, tables))}: one must be called train")
        parts = {"train": next(iter(tables))}
    train = _images(tables[parts["train"]], name)
    others = {parts[part]: _images(tables[parts[part]], name) for part in ("test", "validation") if part in parts}
    tested = next(iter(others), None)
    if train.labels is not None:  # a test part whose labels are kept secret tests nothing
        tested = next((split for split, images in others.items() if images.labels is not None), tested)
    left_out = [split for split in tables if split not in (parts["train"], tested)]
    return HubData(name, train, None if tested is None else others[tested], left_out)


def _load(name: str) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name} needs Hugging Face's library: python -m pip install datasets") from error
    path = os.path.expanduser(name.removeprefix("hf:"))
    saved = any(os.path.isfile(os.path.join(path, file)) for file in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # of its many parts, each has its own
        raise DataError(f"{name} cannot be loaded ({one_line(error)})") from error
    return found if isinstance(found, dict) else {"train": found}


def _images(table: Any, name: str) -> ImageDataset:
    from datasets import ClassLabel, Image

    kinds = table.features
    columns = [column for column, kind in kinds.items() if isinstance(kind, Image)]
    if not columns:
        raise DataError(f"{name} has no images: its columns are {', '.join(kinds)}")
    column = "image" if "image" in columns else columns[0]
    label = next((each for each, kind in kinds.items() if isinstance(kind, ClassLabel)), None)
    labels = None
    if label is not None:
        labels = torch.tensor([-1 if each is None else each for each in table[label][:]], dtype=torch.int64)
    pictures = table.select_columns([column]).cast_column(column, Image(decode=False))
    source = HubImages(pictures, column, name, table._fingerprint)
    if labels is None or (labels < 0).any():  # -1 is no class
        return ImageDataset(source)
    return ImageDataset(source, labels=labels, classes=kinds[label].names)
