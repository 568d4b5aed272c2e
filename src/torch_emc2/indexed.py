"""A data set whose samples come with their index, as losses with a memory need it."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

__all__ = ["IndexedDataset"]


class IndexedDataset(Dataset[tuple[Any, int]]):
    """Wrap a map-style dataset to yield its samples with their indices, ``(dataset[i], i)``.

    A loader collates the samples as usual, together with their indices (b,), int64::

        for (views, labels), index in DataLoader(IndexedDataset(dataset), batch_size=32, shuffle=True):
            ...

    Args:
        dataset: the samples; their number is the loss's ``num_samples``.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the dataset's length."""
        return len(self.dataset)  # type: ignore[arg-type]  # of map-style ones

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return a sample and its index; a negative index is returned as the one from the start."""
        index = range(len(self))[index]
        return self.dataset[index], index

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        """Return the samples of a batch with their indices; some datasets read a batch at once."""
        at_once = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[index] for index in indices] if at_once is None else at_once(indices)
        return list(zip(samples, indices, strict=True))
