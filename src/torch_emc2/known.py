"""What ids, labels and the caller tell of a batch's samples: which candidates are an anchor's own, not negatives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NO_ID", "Known", "Relations", "copies", "first_of", "later", "with_further"]

NO_ID = -1
"""The id of hard negatives that have no id."""


class Relations(NamedTuple):
    """How some anchors are related to all candidates, (n, size) each.

    Attributes:
        related: the candidate belongs to the anchor, by its id, its label or the caller's ``same``.
        excluded: the candidate is no negative: it belongs to the anchor, or repeats an item.
        further: the candidate is a further positive, by its label, each item once; None without labels.
    """

    related: Tensor
    excluded: Tensor
    further: Tensor | None


@dataclass(frozen=True)
class Known:
    """What is known of the samples' pairs, in one direction; looked up for a few anchors at a time.

    Attributes:
        anchor_ids: (size,) or (size, views) ids of the anchors, if any occurs twice; or None.
        candidate_ids: the same for the candidates.
        same: (size, size) further pairs of anchors and candidates, or None.
        labels: (size,) or None.
        later: (size,) which candidates are an item that an earlier sample has too; None if none are.
    """

    anchor_ids: Tensor | None
    candidate_ids: Tensor | None
    same: Tensor | None
    labels: Tensor | None
    later: Tensor | None

    def of(self, samples: Tensor) -> Relations:
        """Return the relations of the anchors of ``samples`` (n,)."""
        own = self._own(samples) if self._has_own else None
        alike = None if self.labels is None else self.labels[samples, None] == self.labels
        assert own is not None or alike is not None
        related = own if alike is None else alike if own is None else own | alike
        assert related is not None
        further = alike if alike is None or own is None else alike & ~own
        if self.later is None:
            return Relations(related, related, further)
        return Relations(related, related | self.later, None if further is None else further & ~self.later)

    @property
    def _has_own(self) -> bool:
        return any(each is not None for each in (self.anchor_ids, self.candidate_ids, self.same))

    def _own(self, samples: Tensor) -> Tensor:
        """(n, size) a sample's own candidates: its partner, those known to be, and others of the same items."""
        size = next(len(each) for each in (self.anchor_ids, self.candidate_ids, self.same) if each is not None)
        own = samples[:, None] == torch.arange(size, device=samples.device)
        if self.anchor_ids is not None:
            own = _with_same_item(own, self.anchor_ids)
        if self.same is not None:
            own = own | (self.same[samples] if self._same_by_item is None else self._same_of_items(samples))
        if self.candidate_ids is not None:
            own = _with_same_item(own, self.candidate_ids)
        return own

    @cached_property
    def _same_by_item(self) -> tuple[Tensor, Tensor] | None:
        """(items, size) what the samples of each anchor item are paired with, and (size, …) the samples' items."""
        if self.anchor_ids is None or self.same is None:
            return None
        items, item_of = torch.unique(self.anchor_ids.view(len(self.anchor_ids), -1), return_inverse=True)
        pairs = torch.zeros(len(items), len(self.same), dtype=torch.int32, device=items.device)
        for of_view in item_of.unbind(1):
            pairs.index_add_(0, of_view, self.same.int())
        return pairs > 0, item_of

    def _same_of_items(self, samples: Tensor) -> Tensor:
        assert self._same_by_item is not None
        pairs, item_of = self._same_by_item
        return pairs[item_of[samples]].any(1)


def _with_same_item(members: Tensor, ids: Tensor) -> Tensor:
    """Add to sets of samples, (n, size) bool, the samples that have an id in common with a member."""
    items, item_of = torch.unique(ids.view(len(ids), -1), return_inverse=True)
    held = torch.zeros(len(members), len(items), device=ids.device)
    for of_view in item_of.unbind(1):
        held.index_add_(1, of_view, members.to(held.dtype))
    return (held > 0)[:, item_of].any(2)


def later(ids: Tensor) -> Tensor:
    """(size,) which samples have an item of ``ids``, (size,) or (size, views), that an earlier sample has."""
    items, item_of = torch.unique(ids.view(len(ids), -1), return_inverse=True)
    sample = torch.arange(len(ids), device=ids.device)[:, None].expand_as(item_of)
    first = sample.new_full((len(items),), len(ids)).scatter_reduce_(0, item_of.flatten(), sample.flatten(), "amin")
    return (first[item_of] < sample).any(1)


def first_of(ids: Tensor, times: int = 1) -> Tensor:
    """(n,) bool, which of ``ids`` (n,) come for the first time, or among the first ``times`` times."""
    ordered, place = ids.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[times:] = ordered[times:] != ordered[:-times]
    return torch.empty_like(new).scatter_(0, place, new)


def copies(ids: Tensor | None, shared_ids: Tensor, private_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(K,) and (local, k) which hard negatives are in the batch already, or were given earlier.

    Args:
        ids: ids of the batch's candidates.
        shared_ids: (K,) ids of the hard negatives for all rows.
        private_ids: (local, k) ids of each sample's hard negatives; or None.
    """
    items = shared_ids[:0] if ids is None else ids.flatten()
    shared = ~first_of(torch.cat([items, shared_ids]))[len(items) :] & (shared_ids != NO_ID)
    if private_ids is None:
        return shared, None
    again = (private_ids[:, :, None] == private_ids[:, None]).tril(-1).any(2)
    return shared, (torch.isin(private_ids, torch.cat([items, shared_ids])) | again) & (private_ids != NO_ID)


def with_further(positives: Tensor, further: Tensor, sample_columns: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``further`` positives (rows, columns) to a row's own (rows, P): their columns and weights, zero for none."""
    mask = further.scatter(1, sample_columns, False).scatter(1, positives, True)
    count = mask.sum(1, keepdim=True)
    columns = mask.long().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    return columns, mask.gather(1, columns).double() / count
