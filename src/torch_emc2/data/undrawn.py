"""Batches whose views are drawn where training is."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from torch_emc2.data.batched import BatchedViews
from torch_emc2.data.errors import DataError
from torch_emc2.data.images import ImageDataset
from torch_emc2.data.loader import Batch
from torch_emc2.data.reading import CARRIED_VIEW, carried_by, read_all, shared
from torch_emc2.data.views import view_seed
from torch_emc2.settings.images import Augmentation

__all__ = ["Undrawn", "UndrawnDataset"]


class Undrawn(NamedTuple):
    """A `Batch` before its views are drawn, of images uint8 (b, c, h, w) and carried ones (k, c, h, w)."""

    images: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    carried_ids: Tensor
    carried: Tensor
    epoch: int
    skipped: int


class UndrawnDataset(Dataset[Undrawn]):
    """Whole batches of images of one size; each view that `draw` makes depends on (seed, epoch, index, view) alone.

    Args:
        images: n of them.
        augmentation: how views are drawn.
        seed: of the views.
        carried_ids: as in `ContrastiveDataset`.
        on_bad_image: stop at an unreadable one, or leave it out and count it.
    """

    def __init__(
        self,
        images: ImageDataset,
        augmentation: Augmentation,
        *,
        seed: int,
        carried_ids: Tensor | None = None,
        on_bad_image: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.images, self.views, self.seed = images, BatchedViews(augmentation), seed
        self.carried_ids = shared(carried_ids, len(images), "image")
        self.on_bad_image = on_bad_image

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Undrawn:
        """Return the batch of keys (epoch, index), of one epoch.

        Raises:
            BadImageError: an image is unreadable, and not to be skipped.
            DataError: fewer than two are readable, or their sizes differ.
        """
        index, images = read_all(keys, self.images.image, self.on_bad_image)
        carried_ids = carried_by(index, self.carried_ids)
        stacked, size = _stack(images + [self.images.image(i) for i in carried_ids.tolist()]), len(index)
        return Undrawn(stacked[:size], index, carried_ids, stacked[size:], keys[0][0], len(keys) - size)

    def draw(self, batch: Undrawn) -> Batch:
        """Draw a batch's views on the device that it is on."""
        images, index, carried_ids, carried, epoch, skipped = batch
        first, second = (self._views(images, epoch, index, view) for view in (0, 1))
        drawn = self._views(carried, epoch, carried_ids, CARRIED_VIEW)
        return Batch(first, second, index, carried_ids, drawn, epoch, skipped)

    def encode_inputs(self, epoch: int, ids: Tensor) -> Tensor:
        """Return the views (k, c, s, s) of carried samples ``ids`` (k,), as they come in a batch's ``carried``."""
        images = _stack([self.images.image(i) for i in ids.tolist()])
        return self._views(images, epoch, ids, CARRIED_VIEW)

    def _views(self, images: Tensor, epoch: int, ids: Tensor, view: int) -> Tensor:
        return self.views(images, [view_seed(self.seed, epoch, i, view) for i in ids.tolist()])


def _stack(images: list[Tensor]) -> Tensor:
    sizes = {image.shape[1:] for image in images}
    if len(sizes) > 1:
        one, other, *_ = ("x".join(map(str, size)) for size in sorted(sizes))
        raise DataError(
            f"data.augment: device needs images of one size, these have {one}, {other}: use data.augment: workers"
        )
    return torch.stack(images)
