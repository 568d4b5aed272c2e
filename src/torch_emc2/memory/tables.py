"""A tensor with one entry per sample: the state of an estimator that remembers something of every sample."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SampleTable"]


class SampleTable:
    """Entries of one shape and dtype, looked up and written by slot (`Slots`); O(batch) per step, whatever its size.

    Args:
        num_samples: number of entries, or None for a table that grows to the largest slot it is given.
        shape: shape of one entry.
        fill: what an entry holds before it is first written.

    The table moves to the device of the slots it is written with, until `share_memory` fixes it in memory that other
    processes read. It is never an inference tensor, even if it is made or moved in inference mode: training could not
    write to one.
    """

    def __init__(self, num_samples: int | None, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> None:
        self.grows = num_samples is None
        self.pinned = False
        self.fill = fill
        with torch.inference_mode(False):
            self.data = torch.full((num_samples or 0, *shape), fill, dtype=dtype)

    def read(self, slots: Tensor) -> Tensor:
        """Return a copy of the entries of ``slots`` (k,), on their device; ``fill`` where a growing table has none."""
        at = slots.to(self.data.device)
        if not self.grows:
            return self.data.index_select(0, at).to(slots.device)
        known = (at >= 0) & (at < len(self.data))
        entries = self.data.new_full((len(at), *self.data.shape[1:]), self.fill)
        entries[known] = self.data[at[known]]
        return entries.to(slots.device)

    def write(self, slots: Tensor, values: Tensor) -> None:
        """Set the entries of ``slots`` (k,), all different, to ``values`` (k, *shape)."""
        self.make_room(slots)
        self.data.index_copy_(0, slots.to(self.data.device), values.to(self.data))

    def add(self, slots: Tensor, values: Tensor) -> None:
        """Add ``values`` (k, *shape) to the entries of ``slots`` (k,), which may repeat."""
        self.make_room(slots)
        self.data.index_add_(0, slots.to(self.data.device), values.to(self.data))

    def make_room(self, slots: Tensor) -> None:
        """Prepare for a write to ``slots``, which then cannot fail; to write several tables, call it on all first."""
        with torch.inference_mode(False):
            data = self.data if self.pinned else self.data.to(slots.device)
            if self.grows and slots.numel() and (needed := int(slots.max()) + 1) > len(data):
                rows = max(needed, 2 * len(data)) - len(data)  # doubling: amortised O(1) an entry
                data = torch.cat([data, data.new_full((rows, *data.shape[1:]), self.fill)])
            self.data = data

    def erase(self, slots: Tensor) -> None:
        """Set the entries of ``slots`` (k,) back to ``fill``."""
        at = slots.to(self.data.device)
        self.data.index_fill_(0, at[at < len(self.data)] if self.grows else at, self.fill)

    def share_memory(self) -> Tensor:
        """Move the entries to shared CPU memory, where they stay, and return them: worker processes see every write."""
        if self.grows:
            raise ValueError("a table that grows cannot be shared with other processes: give num_samples")
        with torch.inference_mode(False):
            self.data = self.data.cpu().share_memory_()  # type: ignore[no-untyped-call]
        self.pinned = True
        return self.data

    def state(self, slots: Tensor | None) -> Tensor:
        """Return what to save: the whole table, or a copy of the entries of ``slots`` if they are given."""
        return self.data if slots is None else self.read(slots.to(self.data.device))

    def check(self, data: object) -> None:
        """Raise ValueError if saved entries (n, *shape) do not fit."""
        saved = f"{data.dtype} {tuple(data.shape)}" if isinstance(data, Tensor) else repr(data)
        fits = isinstance(data, Tensor) and data.is_floating_point() == self.data.is_floating_point()
        if not fits or data.shape[1:] != self.data.shape[1:] or (not self.grows and data.shape != self.data.shape):  # type: ignore[attr-defined]
            raise ValueError(
                f"the saved table is {saved}, this one {self.data.dtype} {tuple(self.data.shape)}: "
                "build the loss with the num_samples and num_chains it was saved with"
            )

    def load(self, data: Tensor) -> None:
        """Load the entries of a saved table (n, *shape)."""
        self.check(data)
        if data.shape == self.data.shape:
            self.data.copy_(data)  # in place: the memory may be shared, and is not needed twice
        else:
            with torch.inference_mode(False):
                self.data = data.to(self.data, copy=True)
