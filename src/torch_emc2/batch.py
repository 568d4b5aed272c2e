"""From what the ranks are called with to what is contrasted with what in the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torch_emc2.geometry import NO_ID, Contrast, first_of, flat
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
    def first(self) -> Tensor | None:
        """(ids,) which ids, view by view, come for the first time; None if all do."""
        return first_of(flat(self.ids)) if self.repeated else None


class _Hard(NamedTuple):
    """Hard negatives: for all rows (of all ranks), (K, d) and (K,); those of a sample, (local, k, d) and (local, k)."""

    shared: Tensor
    shared_ids: Tensor
    own: Tensor | None
    own_ids: Tensor | None


class _Known(NamedTuple):
    """What ids, labels and the caller know of the samples' pairs, in one direction.

    Attributes:
        own: (size, size) sample j's candidate is one of sample i's anchor's own; None: for i = j alone.
        later: (size,) j's candidate is an item that a sample before it has too; None: for none.
        alike: (size, size) i and j have one label; None: there are none.
    """

    own: Tensor | None
    later: Tensor | None
    alike: Tensor | None


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
    if ranks.size < 2 and inputs.hard is None:
        raise ValueError(f"a batch of {ranks.size} has no negatives: give 2 samples or more (drop_last=True helps)")
    sides = [
        _gather_side(vectors, ids, ranks, name, most)
        for vectors, ids, name, most in zip(inputs.vectors, inputs.ids, ("index", "y_index"), num_samples, strict=False)
    ]
    hard = _gather_hard(inputs, ranks, num_hard, sides[-1].whole)
    x, y = sides[0], sides[-1]
    own = _own_pairs(x, y, _gather_same(inputs, ranks), ranks.size)
    labels = None if inputs.labels is None else ranks.gather(inputs.labels)
    same_label = None if labels is None else labels[:, None] == labels
    contrasts = []
    if directions != "y->x":
        contrasts.append(_contrast(ranks, (0, len(sides) - 1), x, y, _Known(own, _later(y), same_label), hard))
    elif inputs.hard is not None:
        raise ValueError('hard negatives are for the rows of "x->y": with directions="y->x" there is no place for them')
    if len(sides) == 2 and directions != "x->y":
        back = None if own is None else own.T
        none = _Hard(y.whole[:0], hard.shared_ids[:0], None, None)
        contrasts.append(_contrast(ranks, (1, 0), y, x, _Known(back, _later(x), same_label), none))
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


def _gather_same(inputs: Inputs, ranks: Ranks) -> Tensor | None:
    """(size, size): each rank knows of its own samples' pairs alone."""
    if inputs.same is None:
        return None
    mine = inputs.same.new_zeros(ranks.local, ranks.size)
    mine[:, ranks.start : ranks.start + ranks.local] = inputs.same
    return ranks.gather(mine)


def _equal(side: _Side) -> Tensor:
    """(size, size) which samples have an id in common."""
    assert side.ids is not None
    ids = side.ids.view(len(side.ids), -1)
    return (ids[:, None, :, None] == ids[None, :, None, :]).any(3).any(2)


def _later(side: _Side) -> Tensor | None:
    return _equal(side).triu(1).any(0) if side.repeated else None


def _own_pairs(x: _Side, y: _Side, same: Tensor | None, size: int) -> Tensor | None:
    """(size, size) whether y_j is one of x_i's own: its partner, one known to be, or the same item as such a one."""
    if same is None and not (x.repeated or y.repeated):
        return None
    pairs = torch.eye(size, device=x.whole.device)
    if same is not None:
        pairs = pairs + (same if x is not y else same | same.T)
    for side, dim in ((x, 0), (y, 1)):
        if side.repeated:
            items = _equal(side).to(pairs)
            pairs = items @ pairs if dim == 0 else pairs @ items
    return pairs > 0


def _contrast(
    ranks: Ranks, direction: tuple[int, int], anchor: _Side, candidate: _Side, known: _Known, hard: _Hard
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
    no_negatives = None
    samples = [part for part in (known.own, known.later, known.alike) if part is not None]
    columns = candidate.whole if not len(hard.shared) else torch.cat([candidate.whole, hard.shared])
    own = None if hard.own is None else hard.own.repeat(row_views, 1, 1)
    own_ids = None if hard.own_ids is None else hard.own_ids.repeat(row_views, 1)
    if samples or len(hard.shared) or own is not None:
        excluded = torch.zeros(ranks.size, ranks.size, dtype=torch.bool, device=device)
        for part in samples:
            excluded = excluded | part
        whole = ranks.mine(excluded).repeat(row_views, column_views)
        no_negatives = torch.cat([whole, *_copies(candidate, hard, len(whole), row_views)], 1)
    own_items = None
    if known.own is not None or known.alike is not None:
        related = torch.zeros_like(excluded)
        for part in (known.own, known.alike):
            if part is not None:
                related = related | part
        views = 1 if candidate.ids is None or candidate.ids.ndim == 1 else column_views
        own_items = ranks.mine(related).repeat(row_views, views)
    if known.alike is not None:
        further = known.alike if known.own is None else known.alike & ~known.own
        positives, weights = _with_further(positives, ranks.mine(further).repeat(row_views, column_views), own_columns)
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
        known=own_items,
        no_negatives=no_negatives,
    )


def _copies(candidate: _Side, hard: _Hard, num_rows: int, row_views: int) -> tuple[Tensor, Tensor]:
    """(rows, K) and (rows, k) hard negatives that a column before them, or of the batch's candidates, has already."""
    items = hard.shared_ids[:0] if candidate.ids is None else candidate.ids.flatten()
    shared = (torch.isin(hard.shared_ids, items) | ~first_of(hard.shared_ids)) & (hard.shared_ids != NO_ID)
    shared = shared.expand(num_rows, -1)
    ids = hard.own_ids
    if ids is None:
        return shared, shared[:, :0]
    again = (ids[:, :, None] == ids[:, None]).tril(-1).any(2)
    own = (torch.isin(ids, torch.cat([items, hard.shared_ids])) | again) & (ids != NO_ID)
    return shared, own.repeat(row_views, 1)


def _with_further(positives: Tensor, further: Tensor, own_columns: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``further`` positives (rows, columns) to a row's own (rows, P): columns, and their weights, zero for none."""
    mask = further.scatter(1, own_columns, False).scatter(1, positives, True)
    count = mask.sum(1, keepdim=True)
    columns = mask.long().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    return columns, mask.gather(1, columns).double() / count


def _require_negatives(contrasts: Sequence[Contrast], ranks: Ranks) -> None:
    for contrast in contrasts:
        if contrast.no_negatives is not None:
            lacking = torch.as_tensor(contrast.num_negatives == 0)
            if ranks.anywhere(bool(lacking.any())):
                raise ValueError(
                    "a row has no negatives: all other samples of the batch are known to be its own, by ids, labels or "
                    "same; give larger batches, or a positive_weight above 0"
                )
