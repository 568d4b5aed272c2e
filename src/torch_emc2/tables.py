"""A tensor with one entry a sample: the state of an estimator that remembers something of every sample."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SampleTable"]


class SampleTable:
    """Entries of one shape and dtype, looked up and written by sample id; O(batch) a step, whatever the table's size.

    Args:
        num_samples: number of entries, or None for a table that grows to the largest id it is given.
        shape: shape of one entry.
        fill: what an entry holds before it is first written.

    The table follows the device of the ids it is written with, until `share_memory` pins it where other processes read
    it.
    """

    def __init__(self, num_samples: int | None, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> None:
        self.grows = num_samples is None
        self.fill = fill
        self.data = torch.full((num_samples or 0, *shape), fill, dtype=dtype)

    def read(self, ids: Tensor) -> Tensor:
        """Return a copy of the entries of ``ids`` (k,), on the device of ``ids``."""
        self._make_room(ids)
        return self.data.index_select(0, ids.to(self.data.device)).to(ids.device)

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Set the entries of ``ids`` (k,), all different, to ``values`` (k, *shape)."""
        self._make_room(ids)
        self.data.index_copy_(0, ids.to(self.data.device), values.to(self.data))

    def share_memory(self) -> Tensor:
        """Move the entries to shared CPU memory, where they stay, and return them: worker processes see every write."""
        if self.grows:
            raise ValueError("a table that grows cannot be shared with other processes: give num_samples")
        self.data = self.data.cpu().share_memory_()  # type: ignore[no-untyped-call]
        return self.data

    def load(self, data: Tensor) -> None:
        """Take over the entries of a saved table (n, *shape)."""
        if data.shape[1:] != self.data.shape[1:] or (not self.grows and data.shape != self.data.shape):
            raise ValueError(
                f"the saved table is {tuple(data.shape)}, this one {tuple(self.data.shape)}: "
                "build the loss with the num_samples and num_chains it was saved with"
            )
        if data.shape == self.data.shape:
            self.data.copy_(data)  # in place: the memory may be shared
        else:
            self.data = data.to(self.data, copy=True)

    def _make_room(self, ids: Tensor) -> None:
        if self.data.device != ids.device and not self.data.is_shared():  # type: ignore[no-untyped-call]
            self.data = self.data.to(ids.device)
        if self.grows and ids.numel() and (needed := int(ids.max()) + 1) > len(self.data):
            rows = max(needed, 2 * len(self.data)) - len(self.data)  # doubling: amortised O(1) an entry
            self.data = torch.cat([self.data, self.data.new_full((rows, *self.data.shape[1:]), self.fill)])
