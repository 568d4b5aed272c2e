"""From what the ranks are called with to what is contrasted with what in the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torch_emc2.geometry import NO_ID, Contrast, first_of, flat
from torch_emc2.known import Known, copies, later, own_pairs, with_further
from torch_emc2.ranks import (
    Ranks,
    exchange,
    fingerprint,
    gather,
    gather_with_gradient,
    raise_together,
    refuse_difference,
    several_ranks,
)
from torch_emc2.validation import Inputs, validate_range

__all__ = ["Directions", "gather_batch"]

Directions = Literal["both", "x->y", "y->x"]


class _Side(NamedTuple):
    """One side of the whole batch.

    Attributes:
        local: (views · local, d) this rank's vectors, with gradient.
        whole: (views · size, d) all ranks'; the same tensor where there is one rank.
        ids: (size,) or (size, views), or None.
        repeated: whether an id occurs twice.
    """

    local: Tensor
    whole: Tensor
    ids: Tensor | None
    repeated: bool

    @property
    def repeated_ids(self) -> Tensor | None:
        """Its ids if one of them occurs twice."""
        return self.ids if self.repeated else None

    @property
    def first(self) -> Tensor | None:
        """(ids,) which ids, view by view, come for the first time; None if all do."""
        return first_of(flat(self.ids)) if self.repeated else None


class _Hard(NamedTuple):
    """Hard negatives: for all rows (of all ranks), (K, d) and (K,); those of a sample, (local, k, d) and (local, k)."""

    shared: Tensor
    shared_ids: Tensor
    own: Tensor | None
    own_ids: Tensor | None

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.own is not None or len(self.shared) > 0


def gather_batch(
    validate: Callable[[], Inputs],
    device: torch.device,
    *,
    directions: Directions = "both",
    num_samples: Sequence[int | None] = (None, None),
    needs_negatives: bool = True,
    alike: Callable[[], Mapping[str, object]] = dict,
) -> tuple[Contrast, ...]:
    """Gather a batch across ranks, and return the contrasts of its directions.

    Where the input of one rank is not usable, all ranks raise.

    Args:
        validate: returns this rank's inputs, or raises.
        device: where they are.
        directions: of two towers.
        num_samples: what ids must be below, a side; or None.
        needs_negatives: refuse a batch in which ids or labels leave a row without negatives.
        alike: returns what else, by name, must be the same on all ranks: numbers, strings, None.
    """
    if several_ranks():
        inputs, ranks, num_hard = _agree(validate, device, alike)
    else:
        inputs = validate()
        ranks, num_hard = Ranks((inputs.size,), 0, device), ()
    of_both = len(inputs.vectors) == 2 and directions != "x->y"
    if ranks.size < 2 and (inputs.hard is None or not inputs.hard.numel() or of_both):
        raise ValueError(f"a batch of {ranks.size} has no negatives: give 2 samples or more (drop_last=True helps)")
    sides = [
        _gather_side(vectors, ids, ranks, name, most)
        for vectors, ids, name, most in zip(inputs.vectors, inputs.ids, ("index", "y_index"), num_samples, strict=False)
    ]
    hard = _gather_hard(inputs, ranks, num_hard, sides[-1].whole)
    _validate_hard_ids(hard, ranks, num_samples[len(sides) - 1])
    x, y = sides[0], sides[-1]
    same = _gather_same(inputs, ranks)
    own = None
    if same is not None or x.repeated or y.repeated:
        own = own_pairs(x.repeated_ids, y.repeated_ids, same, ranks.size, device, one_tower=x is y)
    labels = None if inputs.labels is None else ranks.gather(inputs.labels)
    same_label = None if labels is None else labels[:, None] == labels
    contrasts = []
    if directions != "y->x":
        contrasts.append(
            _contrast(ranks, (0, len(sides) - 1), x, y, Known(own, later(y.repeated_ids), same_label), hard)
        )
    elif inputs.hard is not None:
        raise ValueError('hard negatives are for the rows of "x->y": with directions="y->x" there is no place for them')
    if of_both:
        back = None if own is None else own.T
        none = _Hard(y.whole[:0], hard.shared_ids[:0], None, None)
        contrasts.append(_contrast(ranks, (1, 0), y, x, Known(back, later(x.repeated_ids), same_label), none))
    if needs_negatives:
        _require_negatives(contrasts, ranks)
    return tuple(contrasts)


def _agree(
    validate: Callable[[], Inputs], device: torch.device, alike: Callable[[], Mapping[str, object]]
) -> tuple[Inputs, Ranks, tuple[int, ...]]:
    """Return the inputs that all ranks have found valid, how they are spread, and each rank's hard negatives of all.

    A rank that raised before the others knew would leave them waiting.
    """
    error, report = None, [0, 0, 0, 0]
    try:
        inputs = validate()
        hard = inputs.hard
        shapes = {
            "dimension d": inputs.vectors[0].shape[1],
            "views": inputs.views,
            "bytes a number of float": inputs.vectors[0].element_size(),
            "dimensions of index": None if inputs.ids[0] is None else inputs.ids[0].ndim,
            "y_index": inputs.ids[-1] is not None,
            "kind of hard negatives": None if hard is None else hard.ndim,
            "hard negatives a sample": None if hard is None or hard.ndim == 2 else hard.shape[1],
            "gradient of embeddings": [vectors.requires_grad for vectors in inputs.vectors],
            "gradient of hard negatives": hard is not None and hard.requires_grad,
            "labels": inputs.labels is not None,
            "same": inputs.same is not None,
        }
        shared = 0 if hard is None or hard.ndim == 3 else len(hard)
        settings = {**alike(), **shapes}
        report = [1, inputs.size, shared, fingerprint(settings)]
    except Exception as caught:
        error = caught
    reports = exchange(report, device)
    raise_together(error, [rank for rank, (ok, *_) in enumerate(reports) if not ok], "has unusable input")
    sizes = tuple(size for _, size, *_ in reports)
    if 0 in sizes:
        raise ValueError(f"rank {sizes.index(0)} has an empty batch: give each rank a sample (drop_last=True helps)")
    if len({each for *_, each in reports}) > 1:
        refuse_difference(settings)
    return inputs, Ranks(sizes, dist.get_rank(), device), tuple(shared for *_, shared, _ in reports)


def _gather_side(vectors: Tensor, ids: Tensor | None, ranks: Ranks, name: str, num_samples: int | None) -> _Side:
    repeated = False
    if ids is not None:
        ids = ranks.gather(ids)
        ordered = ids.flatten().sort().values
        validate_range(name, ordered, num_samples)  # of all ranks, on all ranks: they fail together
        repeated = bool((ordered[1:] == ordered[:-1]).any())
    return _Side(vectors, ranks.gather_rows_with_gradient(vectors), ids, repeated)


def _gather_hard(inputs: Inputs, ranks: Ranks, sizes: tuple[int, ...], like: Tensor) -> _Hard:
    hard, ids = inputs.hard, inputs.hard_ids
    if hard is None or hard.ndim == 3:
        return _Hard(like[:0], torch.empty(0, dtype=torch.int64, device=like.device), hard, ids)
    assert ids is not None
    if ranks.world_size > 1:
        hard, ids = gather_with_gradient(hard, sizes, ranks.rank), gather(ids, sizes)
    return _Hard(hard, ids, None, None)


def _validate_hard_ids(hard: _Hard, ranks: Ranks, num_samples: int | None) -> None:
    """Raise IndexError, on all ranks, where an id of a hard negative cannot be one; `NO_ID` is none."""
    ids = hard.shared_ids if hard.own_ids is None else ranks.gather(hard.own_ids).flatten()
    ordered = ids[ids != NO_ID].sort().values
    if len(ordered) and num_samples is not None:
        validate_range("hard_index", ordered, num_samples)


def _gather_same(inputs: Inputs, ranks: Ranks) -> Tensor | None:
    """(size, size): each rank knows of its own samples' pairs alone."""
    if inputs.same is None:
        return None
    mine = inputs.same.new_zeros(ranks.local, ranks.size)
    mine[:, ranks.start : ranks.start + ranks.local] = inputs.same
    return ranks.gather(mine)


def _contrast(
    ranks: Ranks, direction: tuple[int, int], anchor: _Side, candidate: _Side, known: Known, hard: _Hard
) -> Contrast:
    row_views, column_views = len(anchor.local) // ranks.local, len(candidate.whole) // ranks.size
    device = anchor.whole.device
    sample = torch.arange(ranks.local, device=device) + ranks.start
    view = torch.arange(column_views, device=device)
    # A row's own sample's columns, itself first where it is one.
    own_columns = torch.cat([sample[:, None] + view.roll(-row) * ranks.size for row in range(row_views)])
    one_tower = anchor is candidate
    positives = own_columns[:, 1:] if one_tower else own_columns
    weights = torch.full(positives.shape, 1 / positives.shape[1], dtype=anchor.whole.dtype, device=device)
    columns = candidate.whole if not len(hard.shared) else torch.cat([candidate.whole, hard.shared])
    own = None if hard.own is None else hard.own.repeat(row_views, 1, 1)
    own_ids = None if hard.own_ids is None else hard.own_ids.repeat(row_views, 1)
    excluded, related = known.excluded, known.related
    no_negatives = copied = None
    if excluded is not None or hard.given:
        nothing = torch.zeros(ranks.size, ranks.size, dtype=torch.bool, device=device)
        whole = ranks.mine(nothing if excluded is None else excluded).repeat(row_views, column_views)
        shared_copies, own_copies = copies(candidate.ids, hard.shared_ids, hard.own_ids)
        hard_copies = [shared_copies.expand(len(whole), -1), own_copies.repeat(row_views, 1)]
        no_negatives = torch.cat([whole, *(part for part in hard_copies if part.numel())], 1)
        in_batch = nothing[0] if known.later is None else known.later
        copied = torch.cat([in_batch.repeat(column_views), shared_copies])
    if related is not None:
        views = 1 if candidate.ids is None or candidate.ids.ndim == 1 else column_views
        related = ranks.mine(related).repeat(row_views, views)
    if (further := known.further) is not None:
        further = ranks.mine(further).repeat(row_views, column_views)
        positives, weights = with_further(positives, further, own_columns)
    return Contrast(
        ranks=ranks,
        anchors=direction[0],
        candidates=direction[1],
        rows=anchor.local,
        columns=columns,
        anchor_ids=anchor.ids,
        candidate_ids=candidate.ids,
        first_anchors=anchor.first,
        first_candidates=candidate.first,
        own=own,
        own_ids=own_ids,
        shared_ids=hard.shared_ids,
        own_columns=own_columns,
        positives=positives,
        positive_weights=weights.to(anchor.whole.dtype),
        copies=copied,
        known=related,
        no_negatives=no_negatives,
    )


def _require_negatives(contrasts: Sequence[Contrast], ranks: Ranks) -> None:
    for contrast in contrasts:
        if contrast.no_negatives is not None:
            lacking = torch.as_tensor(contrast.num_negatives == 0)
            if ranks.anywhere(bool(lacking.any())):
                raise ValueError(
                    "a row has no negatives: all other samples of the batch are known to be its own, by ids, labels or "
                    "same; give larger batches (InfoNCE bears it)"
                )
