"""Finite augmentation: a fixed number of views of every image, drawn once and kept in a file."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from torch_emc2.data.errors import BadImageError, DataError
from torch_emc2.data.images import ImageDataset
from torch_emc2.data.kept import keep, which
from torch_emc2.data.views import RandomView, seeded_view
from torch_emc2.files import whole_file
from torch_emc2.seeds import own_generator
from torch_emc2.settings.images import Augmentation

__all__ = ["FiniteViews", "finite_views"]

Shape = tuple[int, int, int, int, int]


class FiniteViews:
    """n views of each of m samples in a .npy file, uint8 (m, n, c, s, s); the id of a view is sample · n + view.

    Args:
        file: the views.
        unreadable: samples whose images could not be read, and why; their views are zeros.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, file: Path, unreadable: Mapping[int, str]) -> None:
        self.file, self.unreadable = file, unreadable
        stored = np.load(file, mmap_mode="r")
        if file.stat().st_size != stored.offset + stored.nbytes:
            raise ValueError("bytes are left over")
        self.shape: Shape = stored.shape
        self.num_samples: int = self.shape[0]
        self.num_views: int = self.shape[1]
        self._views = stored.reshape(-1, *self.shape[2:])

    def __len__(self) -> int:
        return self.num_samples * self.num_views

    def __reduce__(self) -> Any:
        return FiniteViews, (self.file, self.unreadable)  # a memory map would be pickled with all that it maps

    def take(self, ids: Tensor) -> Tensor:
        """Return the views ``ids`` (k,), float32 (k, c, s, s) in [0, 1].

        Raises:
            BadImageError: one is of an image that could not be read.
        """
        if self.unreadable:
            for sample in (ids // self.num_views).tolist():
                if sample in self.unreadable:
                    raise BadImageError(self.unreadable[sample])
        return torch.from_numpy(self._views[ids.cpu().numpy()]).float() / 255


def finite_views(
    images: ImageDataset,
    augmentation: Augmentation,
    num_views: int,
    *,
    seed: int,
    folder: Path,
    name: str,
    on_bad_image: Literal["raise", "skip"] = "raise",
    num_workers: int = 0,
) -> FiniteViews:
    """Return the first views of epoch 0 of every image, rounded to uint8; made unless the folder has them whole.

    A file's name is a hash of all that its views depend on: the data set's name, which of its images, for images in
    files those files' paths, sizes, times and decoding, channels, augmentation, number of views and seed. A .json
    beside it has that in words.

    Args:
        images: m of them.
        augmentation: how views are drawn.
        num_views: of each image.
        seed: of the views.
        folder: where files of views are kept.
        name: the data set's.
        on_bad_image: stop at an unreadable one, or leave its views zeros and name it in ``unreadable``.
        num_workers: processes that draw.

    Raises:
        DataError: fewer than two views, or no room for them.
        BadImageError: an image cannot be read, and is not to be skipped.
    """
    if num_views < 2:
        raise DataError(f"num_views must be at least 2, got {num_views}: a positive is another view of the sample")
    origin = {
        "data": name,
        "images": len(images),
        "which": which(images),
        "channels": images.channels,
        "augmentation": asdict(augmentation),
        "views": num_views,
        "seed": seed,
    }
    if images.decoding is not None:
        origin["decoding"] = images.decoding.fields
    shape = len(images), num_views, images.channels, augmentation.size, augmentation.size
    drawn = _Drawn(images, augmentation, num_views, seed, on_bad_image)
    views = keep(
        folder,
        origin,
        ".npy",
        lambda file: _open(file, shape),
        lambda file: _make(file, shape, drawn, origin, num_workers),
    )
    if views.unreadable and on_bad_image == "raise":
        raise BadImageError(next(iter(views.unreadable.values())))
    return views


def _open(file: Path, shape: Shape) -> FiniteViews | None:
    """Open the views in a file; None where it is missing, cut short or damaged."""
    try:
        unreadable = json.loads(file.with_suffix(".json").read_text())["unreadable"]
        views = FiniteViews(file, {int(sample): reason for sample, reason in unreadable.items()})
    except (OSError, EOFError, ValueError, KeyError):
        return None
    return views if views.shape == shape else None


def _make(file: Path, shape: Shape, drawn: _Drawn, origin: dict[str, Any], num_workers: int) -> FiniteViews:
    # A generator of its own: a loader seeds its workers with a draw from torch's.
    loader = DataLoader(drawn, batch_size=None, num_workers=num_workers, generator=own_generator())
    unreadable = {}
    with whole_file(file) as partial:
        needed, free = math.prod(shape), shutil.disk_usage(file.parent).free
        if needed > free:
            raise DataError(
                f"{shape[1]} views of {shape[0]} images take {needed / 1e9:.2f} GB, {str(file.parent)!r} has "
                f"{free / 1e9:.2f} GB free; make room there, or take fewer views, fewer images or a smaller size"
            )
        with partial.open("wb") as out:  # not through a memory map: on a full disk that kills the process
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for sample, views in enumerate(tqdm(loader, "Drawing views", leave=False, disable=None)):
                if isinstance(views, str):
                    unreadable[sample] = views
                    views = torch.zeros(shape[1:], dtype=torch.uint8)
                out.write(views.numpy().data)
            out.flush()
            os.fsync(out.fileno())  # after a loss of power the name would stand for zeros
        with whole_file(file.with_suffix(".json")) as note:
            note.write_text(json.dumps({**origin, "unreadable": unreadable}, indent=2) + "\n")
    return FiniteViews(file, unreadable)


class _Drawn(Dataset[Tensor | str]):
    """The views (n, c, s, s) of an image, or why it cannot be read."""

    def __init__(
        self, images: ImageDataset, augmentation: Augmentation, num_views: int, seed: int, on_bad_image: str
    ) -> None:
        self.images, self.transform, self.num_views = images, RandomView(augmentation), num_views
        self.seed, self.on_bad_image = seed, on_bad_image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            image = self.images.image(i)
        except BadImageError as bad:
            if self.on_bad_image == "raise":
                raise
            return str(bad)
        views = [seeded_view(self.transform, image, self.seed, 0, i, view) for view in range(self.num_views)]
        return (torch.stack(views) * 255).round().to(torch.uint8)
