"""What ids, labels and the caller know of a batch's samples: which candidates are an anchor's own, and no negatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.geometry import NO_ID, first_of

__all__ = ["Known", "copies", "later", "own_pairs", "with_further"]


class Known(NamedTuple):
    """What is known of the samples' pairs, in one direction.

    Attributes:
        own: (size, size) sample j's candidate is one of sample i's anchor's own; None: for i = j alone.
        later: (size,) j's candidate is an item that a sample before it has too; None: for none.
        alike: (size, size) i and j have one label; None: there are none.
    """

    own: Tensor | None
    later: Tensor | None
    alike: Tensor | None

    @property
    def related(self) -> Tensor | None:
        """(size, size) j's candidate belongs to i, by its id, its label or the caller's word."""
        if self.own is None or self.alike is None:
            return self.alike if self.own is None else self.own
        return self.own | self.alike

    @property
    def excluded(self) -> Tensor | None:
        """(size, size) j's candidate is no negative of i: it belongs to i, or stands for an item a second time."""
        if self.later is None or self.related is None:
            return self.related  # who has an item twice has own pairs
        return self.related | self.later

    @property
    def further(self) -> Tensor | None:
        """(size, size) j's candidate is a further positive of i, by its label: each item once."""
        further = self.alike if self.alike is None or self.own is None else self.alike & ~self.own
        return further if further is None or self.later is None else further & ~self.later


def own_pairs(
    x_ids: Tensor | None, y_ids: Tensor | None, same: Tensor | None, size: int, device: torch.device, *, one_tower: bool
) -> Tensor:
    """(size, size) whether y_j is one of x_i's own: its partner, one known to be, or the same item as such a one.

    Args:
        x_ids: (size,) or (size, views) ids of the anchors, where any occurs twice.
        y_ids: the same of the candidates.
        same: (size, size) further pairs.
        size: samples.
        device: where they are.
        one_tower: x and y are the same samples.
    """
    pairs = torch.eye(size, device=device)
    if same is not None:
        pairs = pairs + (same | same.T if one_tower else same)
    if x_ids is not None:
        pairs = _one_item(x_ids).to(pairs) @ pairs
    if y_ids is not None:
        pairs = pairs @ _one_item(y_ids).to(pairs)
    return pairs > 0


def later(ids: Tensor | None) -> Tensor | None:
    """(size,) which samples have an item of ``ids``, (size,) or (size, views), that one before them has."""
    return None if ids is None else _one_item(ids).triu(1).any(0)


def _one_item(ids: Tensor) -> Tensor:
    """(size, size) which samples have an id in common."""
    ids = ids.view(len(ids), -1)
    return (ids[:, None, :, None] == ids[None, :, None, :]).any(3).any(2)


def copies(ids: Tensor | None, shared_ids: Tensor, own_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """(K,) and (local, k) hard negatives that are in the batch already, or given before.

    Args:
        ids: of the batch's candidates.
        shared_ids: (K,) of hard negatives for all rows.
        own_ids: (local, k) of a sample's.
    """
    items = shared_ids[:0] if ids is None else ids.flatten()
    shared = (torch.isin(shared_ids, items) | ~first_of(shared_ids)) & (shared_ids != NO_ID)
    if own_ids is None:
        return shared, shared_ids.new_empty(1, 0, dtype=torch.bool)
    again = (own_ids[:, :, None] == own_ids[:, None]).tril(-1).any(2)
    return shared, (torch.isin(own_ids, torch.cat([items, shared_ids])) | again) & (own_ids != NO_ID)


def with_further(positives: Tensor, further: Tensor, own_columns: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``further`` positives (rows, columns) to a row's own (rows, P): their columns, and weights, zero for none."""
    mask = further.scatter(1, own_columns, False).scatter(1, positives, True)
    count = mask.sum(1, keepdim=True)
    columns = mask.long().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    return columns, mask.gather(1, columns).double() / count
