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
    it. Its memory is that of training also when it is made or moved in inference mode, whose tensors training may not
    write.
    """

    def __init__(self, num_samples: int | None, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> None:
        self.grows = num_samples is None
        self.pinned = False
        self.fill = fill
        with torch.inference_mode(False):
            self.data = torch.full((num_samples or 0, *shape), fill, dtype=dtype)

    def read(self, ids: Tensor) -> Tensor:
        """Return a copy of the entries of ``ids`` (k,), on the device of ``ids``; the table stays as it is."""
        at = ids.to(self.data.device)
        if not self.grows:
            return self.data.index_select(0, at).to(ids.device)
        known = at < len(self.data)
        entries = self.data.new_full((len(at), *self.data.shape[1:]), self.fill)
        entries[known] = self.data[at[known]]
        return entries.to(ids.device)

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Set the entries of ``ids`` (k,), all different, to ``values`` (k, *shape)."""
        self.make_room(ids)
        self.data.index_copy_(0, ids.to(self.data.device), values.to(self.data))

    def make_room(self, ids: Tensor) -> None:
        """Be ready for a write to ``ids``, which then cannot fail: whoever writes several tables calls it on all first.

        Raises:
            ValueError: there is no memory for an id so large; nothing has changed.
        """
        with torch.inference_mode(False):
            data = self.data if self.pinned else self.data.to(ids.device)
            if self.grows and ids.numel() and (needed := int(ids.max()) + 1) > len(data):
                rows = max(needed, 2 * len(data)) - len(data)  # doubling: amortised O(1) an entry
                try:
                    data = torch.cat([data, data.new_full((rows, *data.shape[1:]), self.fill)])
                except RuntimeError as error:
                    raise ValueError(
                        f"no memory for index {needed - 1}: a table that grows has an entry for every id up to the "
                        "largest; number the samples 0, 1, 2, …"
                    ) from error
            self.data = data

    def share_memory(self) -> Tensor:
        """Move the entries to shared CPU memory, where they stay, and return them: worker processes see every write."""
        if self.grows:
            raise ValueError("a table that grows cannot be shared with other processes: give num_samples")
        with torch.inference_mode(False):
            self.data = self.data.cpu().share_memory_()  # type: ignore[no-untyped-call]
        self.pinned = True
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
            with torch.inference_mode(False):
                self.data = data.to(self.data, copy=True)
