"""The rows of a contrast, some at a time: what they are compared with, their positives, and what is no negative.

The whole (rows, columns) matrix is never held: memory is that of some rows, whatever the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.geometry import Contrast
from torch_emc2.known import NO_ID, Relations, with_further

__all__ = ["Positive", "RowBuffer", "Rows", "known_related", "parts"]

_AT_ONCE = {"cpu": 1 << 20}
_AT_ONCE_ELSEWHERE = 1 << 26
_FEWEST_ROWS = 128  # fewer would make matrix products slow


class Positive(NamedTuple):
    """The positives of every row.

    Attributes:
        mean: (rows,) mean of their logits: the positive term.
        log_mass: (rows,) log Σ exp of their logits.
        share: (rows, P) share of each in that mass.
        mean_by_mass: (rows,) mean of their logits with those shares; it is β times the derivative of ``log_mass`` in β.
    """

    mean: Tensor
    log_mass: Tensor
    share: Tensor
    mean_by_mass: Tensor


@dataclass(frozen=True)
class Rows:
    """Some of this rank's rows of a contrast. Below, "rows" are only these.

    Attributes:
        contrast: the direction.
        span: which of the contrast's rows.
    """

    contrast: Contrast
    span: slice

    def of(self, tensor: Tensor) -> Tensor:
        """Cut these rows out of a tensor (all rows, …)."""
        return tensor if self.span.stop - self.span.start == len(tensor) else tensor[self.span]

    @cached_property
    def vectors(self) -> Tensor:
        """(rows, d) unit vectors, without gradient."""
        return self.of(self.contrast.row_vectors)

    @cached_property
    def columns(self) -> Tensor:
        """(C, d) what they are compared with, without gradient."""
        return self.contrast.columns

    @cached_property
    def private(self) -> Tensor | None:
        """(rows, k, d) columns of each row alone, without gradient; or None."""
        return None if self.contrast.private is None else self.of(self.contrast.private.detach())

    @cached_property
    def sample_columns(self) -> Tensor:
        """(rows, column views) columns of the row's own sample."""
        return self.of(self.contrast.layout.sample_columns)

    @cached_property
    def samples(self) -> Tensor:
        """(rows,) the row's sample in the whole batch."""
        ranks = self.contrast.ranks
        rows = torch.arange(self.span.start, self.span.stop, device=self.sample_columns.device)
        return rows % ranks.local + ranks.start

    @cached_property
    def relations(self) -> Relations | None:
        """How the rows' samples are related to all samples."""
        return None if self.contrast.known is None else self.contrast.known.of(self.samples)

    @cached_property
    def _positives(self) -> tuple[Tensor, Tensor]:
        contrast = self.contrast
        positives, weights = self.of(contrast.layout.positives), self.of(contrast.layout.weights)
        if self.relations is None or self.relations.further is None:
            return positives, weights
        positives, weights = with_further(positives, self._in_columns(self.relations.further), self.sample_columns)
        return positives, weights.to(contrast.rows.dtype)

    @property
    def positives(self) -> Tensor:
        """(rows, P) the positives' columns."""
        return self._positives[0]

    @property
    def positive_weights(self) -> Tensor:
        """(rows, P) weight of each in the positive term, summing to one; zero where a row has fewer than P."""
        return self._positives[1]

    @cached_property
    def no_negatives(self) -> Tensor | None:
        """(rows, C + k) columns that are no negatives, in addition to ``sample_columns``; None for none."""
        contrast = self.contrast
        if self.relations is None and not contrast.num_further:
            return None
        hard = [] if contrast.shared_copies is None else [contrast.shared_copies.expand(len(self.vectors), -1)]
        if contrast.private_copies is not None:
            hard.append(self.of(contrast.private_copies))
        if self.relations is None:
            views = contrast.column_views * contrast.ranks.size
            nothing = torch.zeros(len(self.vectors), views, dtype=torch.bool, device=self.vectors.device)
            return torch.cat([nothing, *hard], 1)
        return torch.cat([self._in_columns(self.relations.excluded), *hard], 1)

    def _in_columns(self, of_samples: Tensor) -> Tensor:
        """Expand what is said of samples, (rows, size), to the samples' columns."""
        return of_samples.repeat(1, self.contrast.column_views)

    @cached_property
    def num_negatives(self) -> int | Tensor:
        """Negatives of each row that are not remembered: a number, or (rows,)."""
        contrast = self.contrast
        if self.no_negatives is None or (contrast.known is None and not contrast.num_hard):
            return len(self.columns) - contrast.num_remembered - contrast.column_views
        none = self.no_negatives.scatter(1, self.sample_columns, True)
        none[:, contrast.remembered] = True
        return none.shape[1] - none.sum(1)

    @cached_property
    def log_num_negatives(self) -> float | Tensor:
        """Logarithm of `num_negatives`."""
        count = self.num_negatives
        return count.to(self.vectors.dtype).log() if isinstance(count, Tensor) else math.log(count)

    @cached_property
    def log_with_remembered(self) -> Tensor:
        """(rows,) log(all negatives / negatives that are not remembered), which is added to log κ.

        A remembered negative counts once per view, since it is in every set of proposals.
        """
        assert self.no_negatives is not None
        remembered = (~self.no_negatives[:, self.contrast.remembered]).sum(1) * self.contrast.column_views
        return (remembered / self.num_negatives).to(self.vectors.dtype).log1p()

    def log_mass_in_batch(self, logits: Tensor) -> Tensor:
        """(rows,) log Σ exp over the negatives that are not remembered, from masked logits (rows, C + k)."""
        remembered, private = self.contrast.remembered, logits[:, len(self.columns) :]
        among = logits[:, : remembered.start]
        return (torch.cat([among, private], 1) if private.shape[1] else among).logsumexp(1)

    def similarities(self, scale: float | Tensor = 1.0) -> Tensor:
        """Return the rows' similarities to shared and private columns, (rows, C + k), times ``scale``."""
        rows = self.vectors * scale
        shared = (self.columns @ rows.T).T  # contiguous by column, for chains that move side by side
        if self.private is None:
            return shared
        return torch.cat([shared, torch.bmm(self.private, rows[:, :, None])[:, :, 0]], 1)

    def positive(self, logits: Tensor) -> Positive:
        """Return the positives among logits (rows, C + k)."""
        each, weights = logits.gather(1, self.positives), self.positive_weights
        if each.shape[1] == 1:
            return Positive(each[:, 0], each[:, 0], weights, each[:, 0])
        log_mass = each.masked_fill(weights == 0, -torch.inf).logsumexp(1)
        share = (each - log_mass[:, None]).exp_().masked_fill_(weights == 0, 0.0)
        return Positive((each * weights).sum(1), log_mass, share, (each * share).sum(1))

    def mask_(self, logits: Tensor) -> Tensor:
        """Set logits (rows, C + k) to -inf where a column is no negative."""
        if self.no_negatives is not None:
            logits.masked_fill_(self.no_negatives, -torch.inf)
        return logits.scatter_(1, self.sample_columns, -torch.inf)

    def known_related(self, ids: Tensor) -> Tensor:
        """(rows, j) which of candidates' ``ids`` (rows, j) are known to be the row's own, and so no negatives."""
        contrast = self.contrast
        if self.relations is None and contrast.item_ids.shape == (contrast.ranks.size,):
            return ids == self.of(contrast.partner_ids)[:, None]  # which is never `NO_ID`
        own = contrast.column_ids[self.sample_columns]
        if self.relations is not None:
            views = len(contrast.item_ids) // contrast.ranks.size
            own = torch.cat([own, contrast.item_ids.where(self.relations.related.repeat(1, views), NO_ID)], 1)
        return (ids[:, :, None] == own[:, None]).any(2) & (ids != NO_ID)

    def ids_at(self, columns: Tensor, *, hide_sample: bool) -> Tensor:
        """Return the ids (rows, j) at ``columns`` (rows, j); with ``hide_sample``, `NO_ID` at its own sample's."""
        ids, private_ids = self.contrast.column_ids, self.contrast.private_ids
        if private_ids is None:
            at = ids[columns]
        else:
            private_ids = self.of(private_ids)
            at = torch.cat([ids.expand(len(columns), -1), private_ids], 1).gather(1, columns)
        if not hide_sample:
            return at
        return at.masked_fill_((columns[:, :, None] == self.sample_columns[:, None]).any(2), NO_ID)

    @property
    def private_proposal_ids(self) -> Tensor | None:
        """(rows, k) ids of the row's private columns, `NO_ID` where there is none or it is no negative; or None."""
        private_ids, none = self.contrast.private_ids, self.no_negatives
        if private_ids is None or none is None:
            return None
        return self.of(private_ids).masked_fill(none[:, len(self.columns) :], NO_ID)


def parts(contrast: Contrast, width: int = 0) -> Iterator[Rows]:
    """Yield the rows in blocks, whose similarities, and ``width`` more numbers per row, are few enough to be fast."""
    at_once = _AT_ONCE.get(contrast.rows.device.type, _AT_ONCE_ELSEWHERE)
    step = max(_FEWEST_ROWS, at_once // (len(contrast.columns) + contrast.num_further + width))
    for start in range(0, len(contrast.rows), step):
        yield Rows(contrast, slice(start, min(start + step, len(contrast.rows))))


def known_related(contrast: Contrast, ids: Tensor) -> Tensor:
    """(rows, j) which of candidates' ``ids`` (rows, j), of all rows, are known to be the row's own."""
    known = RowBuffer()
    for part in parts(contrast):
        known.add(part, part.known_related(part.of(ids)))
    return known.tensors[0]


class RowBuffer:
    """Collects tensors (rows, …) of the parts into tensors of all rows, as they come.

    A list of them would not do: small tensors that stay, among large ones that are freed, fragment the heap.

    Attributes:
        tensors: (all rows, …) each, when all are added.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()

    def add(self, rows: Rows, *of_rows: Tensor) -> None:
        """Add the tensors of the next rows."""
        num_rows = len(rows.contrast.rows)
        if rows.span == slice(0, num_rows):
            self.tensors = of_rows
            return
        self.tensors = self.tensors or tuple(part.new_empty(num_rows, *part.shape[1:]) for part in of_rows)
        for whole, part in zip(self.tensors, of_rows, strict=True):
            whole[rows.span] = part
