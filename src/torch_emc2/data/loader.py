"""Batches of two views, with the images that their chains carry."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from torch_emc2.data.errors import DataError
from torch_emc2.data.finite import FiniteViews
from torch_emc2.data.images import ImageDataset
from torch_emc2.data.reading import CARRIED_VIEW, carried_by, read_all, require_two, shared
from torch_emc2.data.views import Transform, seeded_view
from torch_emc2.seeds import mix_seed

__all__ = ["Batch", "ContrastiveDataset", "EpochSampler", "FiniteDataset", "make_loader"]


class Batch(NamedTuple):
    """Two views of each of b samples, and one of each of the k samples that their chains carry.

    Where an image's views are a fixed few, ids are of views, and so are the k carried.

    Attributes:
        first: (b, c, s, s) float32.
        second: likewise.
        index: int64, (b,) of samples or (b, 2) of views.
        carried_ids: int64 (k,), likewise of samples or views, each once, ascending.
        carried: (k, c, s, s).
        epoch: that the views are of.
        skipped: images left out as unreadable.
    """

    first: Tensor
    second: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    carried_ids: Tensor
    carried: Tensor
    epoch: int
    skipped: int


class ContrastiveDataset(Dataset[Batch]):
    """Whole batches of views of images; each view depends on (seed, epoch, index, view) alone.

    Args:
        images: n of them.
        transform: draws a view.
        seed: of the views.
        carried_ids: integers (n, chains), -1 for an empty chain. They are moved to shared memory in place: what the
            training process writes, workers read.
        on_bad_image: stop at an unreadable one, or leave it out and count it.

    Raises:
        DataError: another number of carried ids than of images.
    """

    def __init__(
        self,
        images: ImageDataset,
        transform: Transform,
        *,
        seed: int,
        carried_ids: Tensor | None = None,
        on_bad_image: Literal["raise", "skip"] = "raise",
    ) -> None:
        if on_bad_image not in ("raise", "skip"):
            raise DataError(f"on_bad_image must be 'raise' or 'skip', got {on_bad_image!r}")
        self.images, self.transform, self.seed = images, transform, seed
        self.carried_ids = shared(carried_ids, len(images), "image")
        self.on_bad_image = on_bad_image
        blank = torch.zeros(images.channels, 32, 32, dtype=torch.uint8)
        self.view_shape = seeded_view(transform, blank, seed, 0, 0, 0).shape  # (c, s, s)

    def __len__(self) -> int:
        return len(self.images)

    def view(self, epoch: int, index: int, view: int) -> Tensor:
        """Return a view (c, s, s): 0 and 1 are a batch's two, 2 is the one used when the sample is carried."""
        return self._views(epoch, index, view)[0]

    def encode_inputs(self, epoch: int, ids: Tensor) -> Tensor:
        """Return the views (k, c, s, s) of carried samples ``ids`` (k,), as they come in a batch's ``carried``."""
        return self._stack([self.view(epoch, index, CARRIED_VIEW) for index in ids.tolist()])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """Return the batch of keys (epoch, index), of one epoch.

        Raises:
            BadImageError: an image is unreadable, and not to be skipped.
            DataError: fewer than two are readable.
        """
        epoch = keys[0][0]
        index, pairs = read_all(keys, lambda i: self._views(epoch, i, 0, 1), self.on_bad_image)
        carried_ids = carried_by(index, self.carried_ids)
        return Batch(
            first=self._stack([first for first, _ in pairs]),
            second=self._stack([second for _, second in pairs]),
            index=index,
            carried_ids=carried_ids,
            carried=self.encode_inputs(epoch, carried_ids),
            epoch=epoch,
            skipped=len(keys) - len(pairs),
        )

    def _views(self, epoch: int, index: int, *views: int) -> list[Tensor]:
        image = self.images.image(index)
        return [seeded_view(self.transform, image, self.seed, epoch, index, view) for view in views]

    def _stack(self, views: list[Tensor]) -> Tensor:
        return torch.stack(views) if views else torch.empty(0, *self.view_shape)


class FiniteDataset(Dataset[Batch]):
    """Whole batches of two different ones of each sample's views, under the views' ids.

    Which two, and which of them comes first, depends on (seed, epoch, sample) alone. Samples whose images could not be
    read are left out and counted.

    Args:
        views: of each sample.
        seed: of the choices.
        carried_ids: as in `ContrastiveDataset`, with a row a view.

    Raises:
        DataError: another number of carried ids than of views.
    """

    def __init__(self, views: FiniteViews, *, seed: int, carried_ids: Tensor | None = None) -> None:
        self.views, self.seed = views, seed
        self.carried_ids = shared(carried_ids, len(views), "view")

    def __len__(self) -> int:
        return self.views.num_samples

    def encode_inputs(self, epoch: int, ids: Tensor) -> Tensor:
        """Return the views ``ids`` (k,), (k, c, s, s): the same in every epoch."""
        return self.views.take(ids)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """Return the batch of keys (epoch, sample), of one epoch.

        Raises:
            DataError: fewer than two of its images are readable.
        """
        epoch = keys[0][0]
        unreadable = self.views.unreadable
        read = [sample for _, sample in keys if sample not in unreadable]
        if len(read) < len(keys):
            require_two(len(read), len(keys), next(unreadable[i] for _, i in keys if i in unreadable))
        index = torch.stack([self._two_of(epoch, sample) for sample in read])
        carried_ids = carried_by(index, self.carried_ids)
        return Batch(
            first=self.views.take(index[:, 0]),
            second=self.views.take(index[:, 1]),
            index=index,
            carried_ids=carried_ids,
            carried=self.views.take(carried_ids),
            epoch=epoch,
            skipped=len(keys) - len(read),
        )

    def _two_of(self, epoch: int, sample: int) -> Tensor:
        """Draw two ids of a sample's views, in random order."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch, sample))
        ids: Tensor = sample * self.views.num_views + torch.randperm(self.views.num_views, generator=generator)[:2]
        return ids


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys (epoch, index) in an order that depends on (seed, epoch) alone; what does not fill a batch is left out.

    Ranks take consecutive parts of each global batch, so that the parts of all ranks, one after the other, are the
    batch of a single process.

    Args:
        num_samples: of the data set.
        batch_size: that of one rank.
        seed: of the order.
        rank: this one.
        world_size: how many there are.

    Raises:
        DataError: the samples do not fill one global batch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.batches = num_samples // (batch_size * world_size)
        if self.batches == 0:
            raise DataError(
                f"{num_samples} samples do not fill one global batch of {batch_size * world_size}"
                f"{f' ({batch_size} on each of {world_size} ranks)' if world_size > 1 else ''}; lower batch_size"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self._skipped = 0, 0

    def __len__(self) -> int:
        """Count this rank's samples of a full epoch, skipped ones included."""
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Let the next iteration, and only that one, start after the first ``batches`` of its epoch."""
        if not 0 <= batches <= self.batches:
            raise DataError(f"cannot skip {batches} batches of an epoch of {self.batches}")
        self._skipped = batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self._skipped = self._skipped, 0
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        parts = order[: len(self) * self.world_size].view(self.batches, self.world_size, self.batch_size)
        return iter([(self.epoch, index) for index in parts[start:, self.rank].flatten().tolist()])


def make_loader(
    dataset: Dataset[Any],
    sampler: EpochSampler,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Return a loader of the data set's batches; they do not depend on the number of workers.

    Raises:
        DataError: the batch size is not the sampler's.
    """
    if batch_size != sampler.batch_size:
        raise DataError(f"batch_size {batch_size} is not the sampler's {sampler.batch_size}; give both the same")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def _as_is(batch: Any) -> Any:
    return batch  # `__getitems__` has built it whole; DataLoader's type wants a list here
