"""From the arguments of a call, on all ranks, to what is contrasted with what in the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torch_emc2.geometry import Contrast, flat, layout_of
from torch_emc2.known import NO_ID, Known, copies, first_of, later
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
from torch_emc2.rows import parts
from torch_emc2.validation import Inputs, validate_range

__all__ = ["Directions", "NoNegatives", "gather_batch", "require_negatives"]

Directions = Literal["both", "x->y", "y->x"]


class NoNegatives(ValueError):
    """A row of the batch has no negatives, and everything else is valid; raised on all ranks."""


class _Side(NamedTuple):
    """One side of the whole batch.

    Attributes:
        local: (views · local, d) this rank's vectors, with gradient.
        whole: (views · size, d) all ranks'; the same tensor where there is one rank.
        ids: (size,) or (size, views), or None.
        repeated: whether an id occurs twice.
        slow: (views · size, d) all ranks' vectors by a momentum encoder; or None.
    """

    local: Tensor
    whole: Tensor
    ids: Tensor | None
    repeated: bool
    slow: Tensor | None

    @property
    def repeated_ids(self) -> Tensor | None:
        """The ids if one of them occurs twice, else None."""
        return self.ids if self.repeated else None

    @property
    def first(self) -> Tensor | None:
        """(ids,) which ids, view by view, come for the first time; None if all do."""
        return first_of(flat(self.ids)) if self.repeated else None


class _Hard(NamedTuple):
    """Hard negatives: of all rows (of all ranks), (K, d) and (K,); or of a sample, (local, k, d) and (local, k)."""

    shared: Tensor | None
    shared_ids: Tensor
    private: Tensor | None
    private_ids: Tensor | None

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.private is not None or len(self.shared_ids) > 0


def gather_batch(
    validate: Callable[[], Inputs],
    device: torch.device,
    *,
    directions: Directions = "both",
    num_samples: Sequence[int | None] = (None, None),
    alike: Callable[[], Mapping[str, object]] = dict,
) -> tuple[Contrast, ...]:
    """Gather a batch across ranks, and return the contrasts of its directions.

    If one rank's input cannot be used, all ranks raise.

    Args:
        validate: returns this rank's inputs, or raises.
        device: device of the inputs.
        directions: with two towers; see `ContrastiveLoss`.
        num_samples: for each side, what its ids must be below; or None.
        alike: returns anything else, by name, that must be the same on all ranks: numbers, strings, None.
    """
    if several_ranks():
        inputs, ranks, num_hard = _agree(validate, device, alike)
    else:
        inputs = validate()
        if not inputs.size:
            raise NoNegatives("an empty batch has no negatives: give 2 samples or more (drop_last=True helps)")
        ranks, num_hard = Ranks((inputs.size,), 0, device), ()
    of_both = len(inputs.vectors) == 2 and directions != "x->y"
    slow = inputs.slow or (None, None)
    sides = [
        _gather_side(vectors, each_slow, ids, ranks, name, most)
        for vectors, each_slow, ids, name, most in zip(
            inputs.vectors, slow, inputs.ids, ("index", "y_index"), num_samples, strict=False
        )
    ]
    hard = _gather_hard(inputs, ranks, num_hard, sides[-1].whole)
    _validate_hard_ids(hard, ranks, num_samples[len(sides) - 1])
    x, y = sides[0], sides[-1]
    same = _gather_same(inputs, ranks)
    if same is not None and x is y:
        same = same | same.T
    labels = None if inputs.labels is None else ranks.gather(inputs.labels)
    contrasts = []
    if directions != "y->x":
        contrasts.append(_contrast(ranks, (0, len(sides) - 1), x, y, same, labels, hard))
    elif inputs.hard is not None:
        raise ValueError('hard negatives are for the rows of "x->y": with directions="y->x" there is no place for them')
    if of_both:
        none = _Hard(None, _no_ids(device), None, None)
        contrasts.append(_contrast(ranks, (1, 0), y, x, None if same is None else same.T, labels, none))
    return tuple(contrasts)


def _agree(
    validate: Callable[[], Inputs], device: torch.device, alike: Callable[[], Mapping[str, object]]
) -> tuple[Inputs, Ranks, tuple[int, ...]]:
    """Return the inputs, valid on all ranks, how they are spread, and how many shared hard negatives each rank has.

    A rank that raised alone would leave the others waiting.
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
            "slow": inputs.slow is not None,
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


def _gather_side(
    vectors: Tensor, slow: Tensor | None, ids: Tensor | None, ranks: Ranks, name: str, num_samples: int | None
) -> _Side:
    repeated = False
    if ids is not None:
        ids = ids if ranks.world_size == 1 else ranks.gather(ids.to(ranks.device))
        numbers = ids.flatten().tolist()  # if it is on a GPU, the host waits for it
        if ids.device != ranks.device:  # of a copy: a caller's pinned memory may hold other ids by the time it is read
            ids = ids.clone().to(ranks.device, non_blocking=ids.device.type == "cpu")
        validate_range(name, numbers, num_samples)  # of all ranks, on all ranks: they fail together
        repeated = len(set(numbers)) < len(numbers)
    slow = None if slow is None else ranks.gather_rows(slow)
    return _Side(vectors, ranks.gather_rows_with_gradient(vectors), ids, repeated, slow)


def _gather_hard(inputs: Inputs, ranks: Ranks, sizes: tuple[int, ...], like: Tensor) -> _Hard:
    hard, ids = inputs.hard, inputs.hard_ids
    if hard is None or hard.ndim == 3:
        return _Hard(None, _no_ids(like.device), hard, ids)
    assert ids is not None
    if ranks.world_size > 1:
        hard, ids = gather_with_gradient(hard, sizes, ranks.rank), gather(ids, sizes)
    return _Hard(hard, ids, None, None)


@cache
def _no_ids(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.int64, device=device)


def _validate_hard_ids(hard: _Hard, ranks: Ranks, num_samples: int | None) -> None:
    """Raise IndexError, on all ranks, if an id of a hard negative is out of range; `NO_ID` is not an id."""
    if hard.given and num_samples is not None:
        ids = hard.shared_ids if hard.private_ids is None else ranks.gather(hard.private_ids)
        numbers = [number for number in ids.flatten().tolist() if number != NO_ID]
        validate_range("hard_index", numbers or [0], num_samples)


def _gather_same(inputs: Inputs, ranks: Ranks) -> Tensor | None:
    """(size, size): each rank knows only the pairs of its own samples."""
    if inputs.same is None:
        return None
    mine = inputs.same.new_zeros(ranks.local, ranks.size)
    mine[:, ranks.start : ranks.start + ranks.local] = inputs.same
    return ranks.gather(mine)


def _contrast(
    ranks: Ranks,
    direction: tuple[int, int],
    anchor: _Side,
    candidate: _Side,
    same: Tensor | None,
    labels: Tensor | None,
    hard: _Hard,
) -> Contrast:
    row_views, column_views = len(anchor.local) // ranks.local, len(candidate.whole) // ranks.size
    known = None
    if same is not None or labels is not None or anchor.repeated or candidate.repeated:
        again = None if candidate.repeated_ids is None else later(candidate.repeated_ids)
        known = Known(anchor.repeated_ids, candidate.repeated_ids, same, labels, again)
    columns, shared_copies, private_copies = candidate.whole, None, None
    if hard.given:
        shared_copies, private_copies = copies(candidate.ids, hard.shared_ids, hard.private_ids)
        columns = columns if hard.shared is None else torch.cat([columns, hard.shared])
    one_tower = anchor is candidate
    return Contrast(
        ranks=ranks,
        anchors=direction[0],
        candidates=direction[1],
        rows=anchor.local,
        candidate_vectors=columns,
        anchor_ids=anchor.ids,
        candidate_ids=candidate.ids,
        first_anchors=anchor.first,
        first_candidates=candidate.first,
        private=None if hard.private is None else hard.private.repeat(row_views, 1, 1),
        private_ids=None if hard.private_ids is None else hard.private_ids.repeat(row_views, 1),
        shared_ids=hard.shared_ids,
        shared_copies=shared_copies,
        private_copies=None if private_copies is None else private_copies.repeat(row_views, 1),
        layout=layout_of(ranks, row_views, column_views, one_tower, anchor.whole.dtype, anchor.whole.device),
        known=known,
        slow=candidate.slow,
    )


def require_negatives(contrasts: Sequence[Contrast], widened: Sequence[Contrast], *, of_every_row: bool) -> None:
    """Raise NoNegatives, on all ranks, if a row has no negatives in its batch or from elsewhere.

    Args:
        contrasts: the directions of a batch.
        widened: the same, with the columns from outside the batch.
        of_every_row: refuse a batch if any row has none; False: only a batch of one sample.
    """
    size = contrasts[0].ranks.size
    if (of_every_row or size < 2) and _lack_negatives(contrasts) and _lack_negatives(widened):
        if size < 2:
            raise NoNegatives(f"a batch of {size} has no negatives: give 2 samples or more (drop_last=True helps)")
        raise NoNegatives(
            "a row has no negatives: every other sample of the batch shares its id or label, or is marked in same; "
            "give larger batches, or take InfoNCELoss, in which such rows have no gradient"
        )


def _lack_negatives(contrasts: Sequence[Contrast]) -> bool:
    def lacking(contrast: Contrast) -> bool:
        if contrast.known is None and not contrast.num_hard and contrast.ranks.size > 1:
            return False
        mine = any(bool((torch.as_tensor(part.num_negatives) == 0).any()) for part in parts(contrast))
        return contrast.ranks.anywhere(mine)

    return any(lacking(each) for each in contrasts)  # all ranks get the same answers, and stop at the same one
