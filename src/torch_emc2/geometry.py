"""What is contrasted with what in a batch: rows against columns, which columns are a row's positives, and the ids
behind both.

With one tower all views of the samples are rows and columns, and a row's positives are the other views of its sample
(SimCLR). With two towers the rows are one side and the columns the other, in one direction or both (CLIP; queries and
documents), and a row's positive is its partner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.known import NO_ID, Known, first_of
from torch_emc2.ranks import Ranks

__all__ = ["Contrast", "Layout", "flat", "layout_of"]


class Layout(NamedTuple):
    """Where a row's own columns are.

    Attributes:
        sample_columns: (rows, column views) columns of the row's own sample, which are no negatives; the row itself
            comes first if it is a column.
        positives: (rows, P) columns of the row's positives.
        weights: (rows, P) weight of each in the positive term, summing to one.
    """

    sample_columns: Tensor
    positives: Tensor
    weights: Tensor


@lru_cache(maxsize=16)
def layout_of(
    ranks: Ranks, row_views: int, column_views: int, one_tower: bool, dtype: torch.dtype, device: torch.device
) -> Layout:
    """Lay out this rank's rows in a batch. The result is cached: batches of the same layout share the tensors."""
    with torch.inference_mode(False):
        sample = torch.arange(ranks.local, device=device) + ranks.start
        view = torch.arange(column_views, device=device)
        own = torch.cat([sample[:, None] + view.roll(-row) * ranks.size for row in range(row_views)])
        positives = own[:, 1:] if one_tower else own
        weights = torch.full(positives.shape, 1 / positives.shape[1], dtype=dtype, device=device)
        return Layout(own, positives, weights)


@dataclass(frozen=True)
class Contrast:
    """One direction of a batch: this rank's rows against the columns of all ranks.

    Rows and columns are ordered view by view. The C shared columns are first the samples' (views · size), then hard
    negatives that all rows share, then what is remembered or queued. In logits (rows, C + k) a row's k private columns
    come after these C.

    Attributes:
        ranks: how the batch is spread over ranks.
        anchors: the side of the rows, 0 or 1.
        candidates: the side of the columns.
        rows: (row views · local, d) unit vectors, with gradient.
        candidate_vectors: (C, d) unit vectors of the shared columns, with gradient.
        anchor_ids: (size,) or (size, row views) ids of the samples, or views, behind the rows; None if they have none.
        candidate_ids: (size,) or (size, column views) ids of those behind the columns.
        first_anchors: (len(chain_ids),) which of `chain_ids` come for the first time; None if all do.
        first_candidates: the same for `item_ids`.
        private: (rows, k, d) private columns of each row, its hard negatives or slow positives, with gradient; or None.
        private_ids: (rows, k) their ids on the candidates' side, `NO_ID` for none; or None.
        shared_ids: (C - views · size,) ids of the shared columns that are not the samples'.
        shared_copies: (C - views · size,) which of these are left out, because they repeat an item or stand for none;
            None if none are.
        private_copies: (rows, k) the same for ``private``.
        layout: where a row's own columns are.
        known: what else is known of the samples; None for nothing.
        num_remembered: how many of the shared columns, the last ones, are remembered.
        slow: (views · size, d) unit vectors of the samples' columns by a momentum encoder; or None.
    """

    ranks: Ranks
    anchors: int
    candidates: int
    rows: Tensor
    candidate_vectors: Tensor
    anchor_ids: Tensor | None
    candidate_ids: Tensor | None
    first_anchors: Tensor | None
    first_candidates: Tensor | None
    private: Tensor | None
    private_ids: Tensor | None
    shared_ids: Tensor
    shared_copies: Tensor | None
    private_copies: Tensor | None
    layout: Layout
    known: Known | None
    num_remembered: int = 0
    slow: Tensor | None = None

    def with_remembered(self, ids: Tensor, vectors: Tensor) -> Contrast:
        """Also compare all rows with remembered candidates: ids (k,) and vectors (k, d).

        Left out are ids that are `NO_ID`, ids that come a second time, and ids in the batch, where the vectors are
        fresher.
        """
        met = self._met_ids()
        left_out = ~first_of(torch.cat([met, ids]))[len(met) :] | (ids == NO_ID)
        copies = [left_out] if self.shared_copies is None else [self.shared_copies, left_out]
        return replace(
            self,
            candidate_vectors=torch.cat([self.candidate_vectors, vectors]),
            shared_ids=torch.cat([self.shared_ids, ids]),
            shared_copies=torch.cat(copies),
            num_remembered=len(ids),
        )

    def with_queue(self, ids: Tensor, partners: Tensor, vectors: Tensor) -> Contrast:
        """Pull the rows to their positives' slow vectors, and also compare them with a queue.

        Three kinds of queued candidates are left out: those in the batch, where they are fresher and may be the row's
        own; those that came with an anchor in the batch; and those that were queued again later.

        Args:
            ids: (k,) ids of the candidates, newest first, some `NO_ID`.
            partners: (k, p) ids of the anchors that they came with, some `NO_ID`.
            vectors: (k, d) slow vectors of the candidates.
        """
        assert self.slow is not None
        met = torch.isin(ids, self._met_ids()) & (ids != NO_ID)
        if self.anchor_ids is not None:
            met |= (torch.isin(partners, self.anchor_ids) & (partners != NO_ID)).any(1)
            met |= torch.isin(ids, ids[met & (ids != NO_ID)])  # equal ids are one item, whatever they came with
        once = self.column_views if self.candidate_ids is not None and self.candidate_ids.ndim == 1 else 1
        met |= ~first_of(ids, once) & (ids != NO_ID)  # once for each view, where views share an id
        columns = torch.cat([self.candidate_vectors, vectors]) if len(ids) else self.candidate_vectors
        with_queue = replace(
            self,
            candidate_vectors=columns,
            shared_ids=torch.cat([self.shared_ids, ids]),
            shared_copies=met if self.shared_copies is None else torch.cat([self.shared_copies, met]),
        )
        return with_queue._with_positives(self.slow[self.layout.positives])

    def _with_positives(self, vectors: Tensor) -> Contrast:
        """Use positives (rows, P, d) instead of the samples' own, as private columns that are no negatives."""
        private, shape = vectors, vectors.shape[:2]
        ids, no_negatives = self.shared_ids.new_full(shape, NO_ID), self.shared_ids.new_ones(shape, dtype=torch.bool)
        if self.private is not None and self.private_ids is not None and self.private_copies is not None:
            private = torch.cat([self.private, private], 1)
            ids, no_negatives = torch.cat([self.private_ids, ids], 1), torch.cat([self.private_copies, no_negatives], 1)
        last = len(self.candidate_vectors) + private.shape[1]
        positives = torch.arange(last - shape[1], last, device=ids.device).expand(shape)
        return replace(
            self,
            private=private,
            private_ids=ids,
            private_copies=no_negatives,
            layout=self.layout._replace(positives=positives),
        )

    def partners(self) -> Tensor:
        """(views · size, p) ids of the samples' partners, by column: of the other views, or of the other tower."""
        size, views = self.ranks.size, self.column_views
        if self.anchor_ids is None:
            return self.shared_ids.new_empty(views * size, 0)
        if self.anchors != self.candidates:
            return self.anchor_ids.view(size, -1).repeat(views, 1)
        if self.anchor_ids.ndim == 1:  # all views share one
            return self.anchor_ids.new_empty(views * size, 0)
        return torch.cat([self.anchor_ids.roll(-view, 1)[:, 1:] for view in range(views)])

    def _met_ids(self) -> Tensor:
        """(k,) ids of all that is in the batch, hard negatives included, of all ranks."""
        items = [self.shared_ids]
        if self.candidate_ids is not None:
            items.append(self.item_ids)
        if self.private_ids is not None:  # the views of a sample have the same
            items.append(self.ranks.gather(self.private_ids[: self.ranks.local]).flatten())
        return torch.cat(items)

    @cached_property
    def remembered(self) -> slice:
        """The slice of the columns that are remembered."""
        return slice(len(self.columns) - self.num_remembered, len(self.columns))

    @cached_property
    def row_vectors(self) -> Tensor:
        """(row views · local, d) the rows, without gradient."""
        return self.rows.detach()

    @cached_property
    def columns(self) -> Tensor:
        """(C, d) the columns, without gradient."""
        return self.candidate_vectors.detach()

    @cached_property
    def row_views(self) -> int:
        """Rows per sample."""
        return len(self.rows) // self.ranks.local

    @cached_property
    def column_views(self) -> int:
        """Columns per sample."""
        return (len(self.columns) - len(self.shared_ids)) // self.ranks.size

    @property
    def num_further(self) -> int:
        """Number of columns that a row is compared with in addition to the samples'."""
        return len(self.shared_ids) + (0 if self.private is None else self.private.shape[1])

    @property
    def num_hard(self) -> int:
        """Number of these that are not remembered: hard negatives and, with a queue, the queue and slow positives."""
        return self.num_further - self.num_remembered

    def negatives_in_data(self, num_samples: int) -> int:
        """Count a row's negatives in data of ``num_samples`` samples (views, with an id per view)."""
        views = self.column_views
        by_view = self.candidate_ids is not None and self.candidate_ids.ndim == 2
        return num_samples - views if by_view else (num_samples - 1) * views

    @property
    def shared_chains(self) -> bool:
        """Whether a sample has several rows and these share one id."""
        assert self.anchor_ids is not None
        return self.row_views > 1 and self.anchor_ids.ndim == 1

    @cached_property
    def chain_ids(self) -> Tensor:
        """(size,) ids of the batch's samples where their rows share them, else (row views · size,) of the rows."""
        return flat(self.anchor_ids)

    @cached_property
    def item_ids(self) -> Tensor:
        """(size,) or (column views · size,) ids of the whole batch's candidates, in the order of its first vectors."""
        return flat(self.candidate_ids)

    @cached_property
    def column_ids(self) -> Tensor:
        """(C,) ids of the samples, or views, behind the columns; `NO_ID` for hard negatives without one."""
        ids = self.item_ids.repeat(self.column_views * self.ranks.size // len(self.item_ids))
        return torch.cat([ids, self.shared_ids]) if self.num_further else ids

    @cached_property
    def partner_ids(self) -> Tensor:
        """(rows,) id of the first of each row's own columns: its partner, or with one tower itself."""
        return self.column_ids[self.layout.sample_columns[:, 0]]

    @cached_property
    def copies(self) -> Tensor:
        """(C,) which columns repeat an item, and so are no negatives of any row."""
        later = None if self.known is None else self.known.later
        if later is None:
            later = torch.zeros(self.ranks.size, dtype=torch.bool, device=self.columns.device)
        copied = later.repeat(self.column_views)
        return copied if self.shared_copies is None else torch.cat([copied, self.shared_copies])

    def items(self) -> tuple[Tensor, Tensor]:
        """Ids (k,), all different, and vectors (k, d) of the batch's candidates, of all ranks, hard ones included."""
        ids, vectors = self.item_ids, self.columns
        if not self.num_hard:
            vectors, first = vectors[: len(ids)], self.first_candidates
            return (ids, vectors) if first is None else (ids[first], vectors[first])
        hard = slice(len(vectors) - len(self.shared_ids), self.remembered.start)
        vectors = torch.cat([vectors[: len(ids)], vectors[hard]])
        ids = torch.cat([ids, self.column_ids[hard]])
        if self.private is not None and self.private_ids is not None:
            local = self.ranks.local  # the views of a sample have the same
            ids = torch.cat([ids, self.ranks.gather(self.private_ids[:local]).flatten()])
            vectors = torch.cat([vectors, self.ranks.gather(self.private[:local].detach()).flatten(0, 1)])
        kept = first_of(ids) & (ids != NO_ID)
        return ids[kept], vectors[kept]

    def to_rows(self, entries: Tensor) -> Tensor:
        """Give each of this rank's rows the entry (rows, …) of its chain, out of (len(chain_ids), …)."""
        if self.shared_chains:
            entries = entries.repeat(self.row_views, *[1] * (entries.ndim - 1))
        return self.ranks.my_rows(entries)

    def some_ids(self, ids: Tensor) -> Tensor:
        """Return candidates' ``ids`` or, if there are none, an id of the batch, to be encoded but not used.

        ``encode`` may call a collective, as a sharded model does: if one rank calls it, all must.
        """
        return ids if len(ids) else self.partner_ids[:1]


def flat(ids: Tensor | None) -> Tensor:
    """Ids (size,) as they are; (size, views) view by view."""
    assert ids is not None
    return ids if ids.ndim == 1 else ids.T.flatten()
