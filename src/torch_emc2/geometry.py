"""What is contrasted with what in a batch: rows against columns, which columns are a row's positives, which no
negatives, and the ids behind both.

With one tower all views of the samples are rows and columns, and a row's positives are the other views of its sample
(SimCLR). With two towers the rows are one side and the columns the other, in one direction or both (CLIP; queries and
documents), and a row's positive is its partner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.ranks import Ranks

__all__ = ["NO_ID", "Contrast", "Positive", "first_of", "flat"]

NO_ID = -1
"""The id of hard negatives that have none."""


class Positive(NamedTuple):
    """The positives of every row.

    Attributes:
        mean: (rows,) mean of their logits: the positive term.
        log_mass: (rows,) log Σ exp of their logits.
        share: (rows, P) of each in that mass.
    """

    mean: Tensor
    log_mass: Tensor
    share: Tensor


@dataclass(frozen=True)
class Contrast:
    """One direction of a batch, of all ranks: this rank's rows against all columns.

    Rows and columns come view by view. Columns are first the samples' (views · size), then hard negatives that all rows
    share; logits (rows, C + k) have a row's own k hard negatives after its C columns.

    Attributes:
        ranks: how the batch is spread.
        anchors: the side of the rows, 0 or 1.
        candidates: the side of the columns.
        rows: (row views · local, d) unit vectors, with gradient.
        columns: (C, d) unit vectors, with gradient.
        anchor_ids: (size,) or (size, row views) ids of the samples, or views, behind the rows; None if they have none.
        candidate_ids: (size,) or (size, column views) of those behind the columns.
        first_anchors: (len(chain_ids),) which of `chain_ids` are met for the first time; None for all.
        first_candidates: the same of `item_ids`.
        own: (rows, k, d) hard negatives of each row alone, with gradient; or None.
        own_ids: (rows, k) their ids on the candidates' side, `NO_ID` for none; or None.
        shared_ids: (C - views · size,) the same of those that all rows share.
        own_columns: (rows, column views) of the row's own sample, itself first if it is one: they are no negatives.
        positives: (rows, P) a row's positives among the columns.
        positive_weights: (rows, P) of each in the positive term, summing to one; zero where a row has fewer than P.
        copies: (C,) columns that stand for an item a second time, no negatives of any row; None for none.
        known: (rows, len(item_ids)) which of `item_ids` are known to be the row's own, beside its sample's; None: none.
        no_negatives: (rows, C + k) columns that are no negatives, beside ``own_columns``; None for none.
    """

    ranks: Ranks
    anchors: int
    candidates: int
    rows: Tensor
    columns: Tensor
    anchor_ids: Tensor | None
    candidate_ids: Tensor | None
    first_anchors: Tensor | None
    first_candidates: Tensor | None
    own: Tensor | None
    own_ids: Tensor | None
    shared_ids: Tensor
    own_columns: Tensor
    positives: Tensor
    positive_weights: Tensor
    copies: Tensor | None
    known: Tensor | None
    no_negatives: Tensor | None

    @cached_property
    def row_views(self) -> int:
        """Rows a sample."""
        return len(self.rows) // self.ranks.local

    @cached_property
    def column_views(self) -> int:
        """Columns a sample."""
        return (len(self.columns) - len(self.shared_ids)) // self.ranks.size

    @property
    def num_hard(self) -> int:
        """Hard negatives that a row meets."""
        return len(self.shared_ids) + (0 if self.own is None else self.own.shape[1])

    @cached_property
    def num_negatives(self) -> int | Tensor:
        """Negatives of each row: a number, or (rows,)."""
        everything = len(self.columns) + (0 if self.own is None else self.own.shape[1])
        if self.no_negatives is None:
            return everything - self.column_views
        return everything - self.no_negatives.scatter(1, self.own_columns, True).sum(1)

    @cached_property
    def log_num_negatives(self) -> float | Tensor:
        """Logarithm of `num_negatives`."""
        count = self.num_negatives
        return count.to(self.rows.dtype).log() if isinstance(count, Tensor) else math.log(count)

    def negatives_in_data(self, num_samples: int) -> int:
        """Count a row's negatives in data of so many samples, or views where these have an id each."""
        views = self.column_views
        by_view = self.candidate_ids is not None and self.candidate_ids.ndim == 2
        return num_samples - views if by_view else (num_samples - 1) * views

    @property
    def shared_chains(self) -> bool:
        """Whether the rows of a sample, more than one, have one id."""
        assert self.anchor_ids is not None
        return self.row_views > 1 and self.anchor_ids.ndim == 1

    @cached_property
    def chain_ids(self) -> Tensor:
        """(size,) ids of the batch's samples where their rows share them, else (row views · size,) of the rows."""
        return flat(self.anchor_ids)

    @cached_property
    def item_ids(self) -> Tensor:
        """(size,) or (column views · size,) ids of the whole batch's candidates, which its first columns are."""
        return flat(self.candidate_ids)

    @cached_property
    def column_ids(self) -> Tensor:
        """(C,) ids of the samples, or views, behind the columns; `NO_ID` for hard negatives without one."""
        views = self.column_views * self.ranks.size // len(self.item_ids)
        return torch.cat([self.item_ids.repeat(views), self.shared_ids])

    @cached_property
    def partner_ids(self) -> Tensor:
        """(rows,) id of the first of each row's own columns: its partner, or with one tower itself."""
        return self.column_ids[self.own_columns[:, 0]]

    def proposal_ids(self, sets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the ids (sets, s) that all rows have in ``sets`` (sets, n) of columns, and each row's own (rows, k).

        A column that stands for an item a second time has `NO_ID`.
        """
        shared = self.column_ids if self.copies is None else self.column_ids.masked_fill(self.copies, NO_ID)
        shared = shared[sets[sets < len(self.columns)].view(len(sets), -1)]
        if self.own_ids is None or self.no_negatives is None:
            return shared, self.own_ids
        return shared, self.own_ids.masked_fill(self.no_negatives[:, len(self.columns) :], NO_ID)

    def own_place(self, sets: Tensor) -> Tensor:
        """(rows,) where a row's own sample is among the columns of each of ``sets`` (sets, n)."""
        sample = torch.where(sets[0] < self.column_views * self.ranks.size, sets[0] % self.ranks.size, -1)
        place = torch.empty(self.ranks.size, dtype=torch.int64, device=sets.device)
        is_sample = sample >= 0
        place[sample[is_sample]] = is_sample.nonzero()[:, 0]
        return self.ranks.mine(place).repeat(self.row_views)

    def known_own(self, ids: Tensor) -> Tensor:
        """(rows, j) which of candidates' ``ids`` (rows, j) are known to be the row's own, no negatives."""
        own = self.column_ids[self.own_columns]
        if self.known is not None:
            own = torch.cat([own, torch.where(self.known, self.item_ids, NO_ID)], 1)
        return (ids[:, :, None] == own[:, None]).any(2) & (ids != NO_ID)

    def items(self) -> tuple[Tensor, Tensor]:
        """Ids (k,), all different, and vectors (k, d) of the batch's candidates, of all ranks, hard ones included."""
        ids, vectors = self.item_ids, self.columns[: len(self.item_ids)]
        if not self.num_hard:
            first = self.first_candidates
            return (ids, vectors) if first is None else (ids[first], vectors[first])
        ids = torch.cat([ids, self.shared_ids])
        vectors = torch.cat([vectors, self.columns[len(self.columns) - len(self.shared_ids) :]])
        if self.own is not None and self.own_ids is not None:
            local = self.ranks.local  # the views of a sample have the same
            ids = torch.cat([ids, self.ranks.gather(self.own_ids[:local]).flatten()])
            vectors = torch.cat([vectors, self.ranks.gather(self.own[:local].detach()).flatten(0, 1)])
        kept = first_of(ids) & (ids != NO_ID)
        return ids[kept], vectors[kept]

    def ids_at(self, columns: Tensor) -> Tensor:
        """Return the ids (rows, j) at some of each row's columns; `NO_ID` at its own sample's."""
        if self.own_ids is None:
            ids = self.column_ids[columns]
        else:
            ids = torch.cat([self.column_ids.expand(len(columns), -1), self.own_ids], 1).gather(1, columns)
        return ids.masked_fill_((columns[:, :, None] == self.own_columns[:, None]).any(2), NO_ID)

    def to_rows(self, entries: Tensor) -> Tensor:
        """Give each of this rank's rows the entry (rows, …) of its chain, out of (len(chain_ids), …)."""
        if self.shared_chains:
            entries = entries.repeat(self.row_views, *[1] * (entries.ndim - 1))
        return self.ranks.my_rows(entries)

    def some_ids(self, ids: Tensor) -> Tensor:
        """Return candidates' ``ids``, or where there are none one of the batch's, to be encoded and not used.

        What `encode` calls may be a collective, as a sharded model is: if one rank calls it all must.
        """
        return ids if len(ids) else self.partner_ids[:1]

    def similarities(self) -> Tensor:
        """Compare rows and columns, and what is the row's own: (rows, C + k)."""
        shared = self.rows @ self.columns.T
        return shared if self.own is None else torch.cat([shared, (self.own @ self.rows[:, :, None])[:, :, 0]], 1)

    def positive(self, logits: Tensor) -> Positive:
        """Look at the positives among logits (rows, C + k)."""
        each = logits.gather(1, self.positives)
        if each.shape[1] == 1:
            return Positive(each[:, 0], each[:, 0], self.positive_weights)
        log_mass = each.masked_fill(self.positive_weights == 0, -torch.inf).logsumexp(1)
        share = (each - log_mass[:, None]).exp_().masked_fill_(self.positive_weights == 0, 0.0)
        return Positive((each * self.positive_weights).sum(1), log_mass, share)

    def mask_(self, logits: Tensor) -> Tensor:
        """Set to -inf what is no negative in logits (rows, C + k)."""
        if self.no_negatives is not None:
            logits.masked_fill_(self.no_negatives, -torch.inf)
        return logits.scatter_(1, self.own_columns, -torch.inf)


def first_of(ids: Tensor) -> Tensor:
    """(n,) bool, which of ``ids`` (n,) come for the first time."""
    ordered, place = ids.sort(stable=True)
    new = torch.cat([ordered[:1] == ordered[:1], ordered[1:] != ordered[:-1]])
    return torch.empty_like(new).scatter_(0, place, new)


def flat(ids: Tensor | None) -> Tensor:
    """Ids (size,) as they are; (size, views) view by view."""
    assert ids is not None
    return ids if ids.ndim == 1 else ids.T.flatten()
