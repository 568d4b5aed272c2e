"""A visit: every row's chains move through the batch, and the kernel's estimates are the weights of the negatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_emc2.geometry import Contrast
from torch_emc2.kernels import EMPTY, Kernel, Visit
from torch_emc2.known import NO_ID
from torch_emc2.losses.carried import CarriedVectors, encode_carried
from torch_emc2.losses.chain_memory import ChainMemory
from torch_emc2.losses.draws import BatchDraws
from torch_emc2.losses.encode import CheckedEncode
from torch_emc2.losses.weighting import Conclusion, Scores, Weighing, Weights
from torch_emc2.rows import Rows, known_related

__all__ = ["ChainSettings", "Visiting"]


@dataclass(frozen=True)
class ChainSettings:
    """How a loss's chains move.

    Attributes:
        kernel: the kernel that moves them.
        num_chains: chains per sample.
        carry: where carried negatives' embeddings come from; see `EMC2Loss`.
        weighs_positive: whether the positive is a state.
        writes: whether the chains' final states are remembered.
    """

    kernel: Kernel
    num_chains: int
    carry: str
    weighs_positive: bool
    writes: bool


class Visiting(Weighing):
    """One direction's visit.

    Args:
        contrast: the direction.
        anchors: memory of the side whose chains move.
        candidates: memory of the side of the negatives.
        settings: how the chains move.
        draws: the random draws.
        temperature: 1 / β.
        encode: the caller's ``encode``, checked; or None.
    """

    def __init__(
        self,
        contrast: Contrast,
        anchors: ChainMemory,
        candidates: ChainMemory,
        settings: ChainSettings,
        draws: BatchDraws,
        temperature: float | Tensor,
        encode: CheckedEncode | None,
    ) -> None:
        self.anchors, self.candidates, self.settings, self.draws = anchors, candidates, settings, draws
        self.temperature, self.encode = temperature, encode
        self.chances = draws.chances(settings.num_chains)
        self.ids = contrast.column_ids
        if contrast.known is not None or contrast.num_further:
            self.ids = self.ids.masked_fill(contrast.copies, NO_ID)  # a second copy of an item is no proposal
        super().__init__(contrast)

        slots = anchors.slots.find(contrast.chain_ids)
        carried_by_all = anchors.chains.ids.read(slots).long()  # of the whole batch, the same on every rank
        carried = contrast.to_rows(carried_by_all)
        self.carried = carried.masked_fill_(known_related(contrast, carried), EMPTY)  # no longer a negative
        self.empty = self.carried == EMPTY
        self.vectors: CarriedVectors | None = None
        self.similarity: Tensor | None = None  # (rows, chains) of the carried negatives
        if settings.carry == "encode":
            anywhere = bool((carried_by_all != EMPTY).any())
            self.vectors = encode_carried(contrast, self.carried, ~self.empty, anywhere, encode)
        elif settings.carry in ("cache", "defer"):
            self.vectors = candidates.recall(self.carried, contrast.row_vectors)
        if self.vectors is not None:
            self.similarity = self.vectors.similarities(contrast.row_vectors)
        elif anchors.chains.similarities is not None:
            self.similarity = contrast.to_rows(anchors.chains.similarities.read(slots)).to(contrast.rows.dtype)

    def weigh(self, rows: Rows, scores: Scores) -> Weights:
        """Move the rows' chains through the batch."""
        carried, empty = rows.of(self.carried), rows.of(self.empty)
        if self.similarity is None:  # no chain carries anything yet
            score = torch.zeros_like(carried, dtype=scores.logits.dtype)
        else:
            score = rows.of(self.similarity) / self.temperature
        logits, place = self._in_sets(scores.logits), None
        if not self.settings.weighs_positive:
            score = score.masked_fill_(empty, -torch.inf)
        else:
            at_positive = scores.log_positive[:, None] - math.log(self.contrast.column_views)  # it is in each set
            score = torch.where(empty, at_positive, score)
            logits = logits.scatter(1, rows.sample_columns, at_positive.expand_as(rows.sample_columns))
            place = self.chances.place[rows.samples]
        visit = Visit(
            logits,
            self.chances.sets,
            score,
            rows.of(self.chances.keep_in),
            carried,
            self.ids,
            rows.private_proposal_ids,
            place,
            room=scores.masses,
        )
        weights, at_carried, state, acceptance = self.settings.kernel.move(visit, self.draws.of(rows.span))

        w_pos = None
        if self.settings.weighs_positive:
            w_pos = weights.gather(1, rows.sample_columns).sum(1) + (at_carried * empty).mean(1)
            weights.scatter_(1, rows.sample_columns, 0.0)
            at_carried = at_carried.masked_fill(empty, 0.0)
        stays, column = state < 0, state.clamp(min=0)
        ends = torch.where(stays, carried, rows.ids_at(column, hide_sample=self.settings.weighs_positive))
        kept: tuple[Tensor, ...] = ends, at_carried, acceptance
        if self.anchors.chains.similarities is not None:
            kept = *kept, stays, torch.where(stays, score, scores.logits.gather(1, column)) * self.temperature
        return Weights(weights, w_pos, kept=kept)

    def _in_sets(self, logits: Tensor) -> Tensor:
        """Make a hard negative count once: it is proposed in every set, while a view of a sample is in one set only.

        Remembered columns stay as they are: in each set they stand next to one view of every sample, with equal weight.
        """
        contrast = self.contrast
        if not contrast.num_hard:
            return logits
        samples, remembered, in_sets = contrast.column_views * contrast.ranks.size, contrast.remembered, logits.clone()
        for hard in slice(samples, remembered.start), slice(remembered.stop, None):  # shared by all rows, and private
            in_sets[:, hard] -= math.log(contrast.column_views)
        return in_sets

    def conclude(self, kept: tuple[Tensor, ...]) -> Conclusion:
        """Weigh the carried negatives, and prepare the write of where the chains ended."""
        ends, at_carried, acceptance, *stored = kept
        similarity = stored[1] if stored else None
        vectors, contrast = self.vectors, self.contrast
        if self.settings.carry == "encode_if_used":
            used = at_carried > 0
            anywhere = contrast.ranks.anywhere(bool(used.any()))
            vectors = encode_carried(contrast, self.carried, used, anywhere, self.encode)
            if vectors is not None:  # a stored score that is never renewed could hold its chain forever
                assert similarity is not None
                similarity = torch.where(stored[0] & used, vectors.similarities(contrast.row_vectors), similarity)
        weight = at_carried if self.settings.num_chains == 1 else at_carried / self.settings.num_chains
        carried = None if vectors is None else vectors.weighed(weight)
        owed = self._owed() if self.settings.carry == "defer" and self.settings.writes else None
        return Conclusion(
            carried,
            owed,
            self._writing(ends, similarity, weight) if self.settings.writes else None,
            {"acceptance": acceptance, "carried_share": at_carried},
        )

    def _writing(self, ends: Tensor, similarity: Tensor | None, weight: Tensor) -> Callable[[], None]:
        """Prepare the write of where the chains ended: id and similarity (rows, chains).

        A chain that views share keeps the final state of the view that was drawn.
        """
        contrast, keep_view = self.contrast, self.chances.keep_view

        def of_samples(rows: Tensor) -> Tensor:
            if contrast.shared_chains:
                rows = rows.view(contrast.row_views, *keep_view.shape).gather(0, keep_view[None])[0]
            return contrast.ranks.gather_rows(rows)

        kept = None if similarity is None else of_samples(similarity)
        writes = [self.anchors.moving(contrast.chain_ids, of_samples(ends), kept, contrast.first_anchors)]
        if self.candidates.cached:
            writes.append(self.candidates.caching(*contrast.items()))
        if self.settings.carry == "defer":
            writes.append(self._deferring(weight))

        def write_all() -> None:
            for write in writes:
                write()

        return write_all

    def _owed(self) -> Tensor:
        """(k, d) the gradient that the batch's candidates are owed, by item; a repeated item gets it once."""
        contrast = self.contrast
        owed = self.candidates.owed_to(contrast.item_ids, contrast.row_vectors)
        first = contrast.first_candidates
        return owed if first is None else owed * first[:, None]

    def _deferring(self, weight: Tensor) -> Callable[[], None]:
        """Prepare the write of what all rows owe to carried negatives: Σ β w · row, with weights w (rows, chains)."""
        contrast, ranks = self.contrast, self.contrast.ranks
        share = 1 / (contrast.row_views * ranks.size)  # of one row in the mean
        weights, carried = ranks.gather_rows(weight * (share / self.temperature)), ranks.gather_rows(self.carried)
        sent = (weights[:, :, None] * ranks.gather_rows(contrast.row_vectors)[:, None]).flatten(0, 1)
        return self.candidates.owing(contrast.item_ids, carried.flatten(), sent)
