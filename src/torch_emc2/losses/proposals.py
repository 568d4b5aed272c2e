"""A batch's negatives as proposals: in sets of one view of every sample each, in an order drawn for the call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_emc2.geometry import Contrast
from torch_emc2.known import NO_ID
from torch_emc2.losses.draws import Chances
from torch_emc2.rows import Rows

__all__ = ["Proposals"]


class Proposals:
    """Sets of proposals, which are the contrast's columns in their order: the logits need no more than another shape.

    Hard negatives are in each set, of which a view of a sample is in one, and weighed for that. Where there are some,
    proposals are looked up among the logits instead.

    Args:
        contrast: the direction.
        chances: what was drawn for it.

    Attributes:
        contrast: the direction, with its columns in the order of the proposals.
        ids: (sets, s) of those that all rows share; `NO_ID` for an item that comes a second time.
    """

    def __init__(self, contrast: Contrast, chances: Chances) -> None:
        self._sets, self._place = chances.sets, chances.place
        self._in_order = contrast.num_hard == 0
        if self._in_order:
            order = chances.sets.flatten()
            place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
            contrast = contrast.in_order(order, place)
        self.contrast = contrast
        ids = contrast.column_ids
        if contrast.known is not None or contrast.num_hard:
            ids = ids.masked_fill(contrast.copies, NO_ID)
        if self._in_order:
            self.ids = ids.view_as(chances.sets)
        else:
            self.ids = ids[chances.sets[chances.sets < len(ids)].view(len(chances.sets), -1)]

    def log_scores(self, logits: Tensor) -> Tensor:
        """Arrange logits (rows, C + k) as (rows, sets, n)."""
        if self._in_order:
            return logits.view(len(logits), *self._sets.shape)
        first_hard = self.contrast.column_views * self.contrast.ranks.size
        logits = logits.clone()
        logits[:, first_hard:] -= math.log(self.contrast.column_views)
        return logits[:, self._sets]

    def room(self, masses: Tensor) -> Tensor | None:
        """Offer the memory of ``masses`` (rows, C + k) for weights, where it has their shape."""
        return masses.view(len(masses), *self._sets.shape) if self._in_order else None

    def to_columns(self, weights: Tensor, logits: Tensor) -> Tensor:
        """Give weights (rows, sets, n) back to the columns of ``logits`` (rows, C + k)."""
        if self._in_order:
            return weights.view_as(logits)
        return torch.zeros_like(logits).index_add_(1, self._sets.flatten(), weights.flatten(1))

    def own_place(self, rows: Rows) -> Tensor:
        """(rows,) where each row's own sample is among a set's proposals."""
        return self._place[rows.samples]

    def column(self, in_set: Tensor, proposal: Tensor) -> Tensor:
        """Return which column a proposal is, of any shape."""
        if self._in_order:
            return in_set * self._sets.shape[1] + proposal
        return self._sets[in_set, proposal]
