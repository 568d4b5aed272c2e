"""The pairs of a batch: rows (anchors), columns (candidates), and which column is whose; gathered across ranks.

With b samples in the whole batch, columns 0 … b-1 are their first views and b … 2b-1 their second ones. A rank's rows
are the first, then the second views of its own samples. A row's positive is the other view of its sample; every column
of another sample is a negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from torch_emc2.ranks import (
    exchange,
    fingerprint,
    gather,
    gather_with_gradient,
    raise_together,
    refuse_difference,
    several_ranks,
)
from torch_emc2.unit import unit_vectors

__all__ = ["Pairs", "make_pairs", "unique_ids"]


@dataclass(frozen=True)
class Pairs:
    """A validated, normalised, gathered batch.

    Attributes:
        rows: (2 · local, d) unit vectors of this rank's samples, with gradient.
        columns: (2 · size, d) unit vectors of all ranks' samples, with gradient.
        index: (size,) or (size, 2) int64 ids of all samples, or None where the loss needs none.
        sizes: samples of each rank.
        rank: this rank.
    """

    rows: Tensor
    columns: Tensor
    index: Tensor | None
    sizes: tuple[int, ...]
    rank: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.sizes)

    @property
    def start(self) -> int:
        """Position of this rank's first sample in the whole batch."""
        return sum(self.sizes[: self.rank])

    @property
    def local(self) -> int:
        """Samples of this rank."""
        return self.sizes[self.rank]

    @property
    def size(self) -> int:
        """Samples of the whole batch."""
        return sum(self.sizes)

    @property
    def num_negatives(self) -> int:
        """Negatives of each row."""
        return 2 * self.size - 2

    @cached_property
    def own_columns(self) -> Tensor:
        """(rows, 2) columns of the row's own sample, itself and its positive: the ones that are no negatives."""
        first = torch.arange(self.start, self.start + self.local, device=self.rows.device)
        both = torch.stack([first, first + self.size], 1)
        return torch.cat([both, both.flip(1)])

    @property
    def positive(self) -> Tensor:
        """(rows,) column of each row's positive."""
        return self.own_columns[:, 1]

    def view_ids(self, view: int) -> Tensor:
        """(size,) ids of the samples, or with (size, 2) ids, of their first (0) or second (1) views."""
        assert self.index is not None
        return self.index if self.index.ndim == 1 else self.index[:, view]

    @cached_property
    def column_ids(self) -> Tensor:
        """(columns,) ids of the samples, or views, behind the columns."""
        return torch.cat([self.view_ids(0), self.view_ids(1)])

    @cached_property
    def row_ids(self) -> Tensor:
        """(rows,) ids of the samples, or views, behind the rows."""
        return self.own_rows(self.column_ids)

    def mine(self, whole: Tensor) -> Tensor:
        """Cut this rank's part out of a tensor (size, …) over the whole batch."""
        return whole[self.start : self.start + self.local]

    def own_rows(self, columns: Tensor) -> Tensor:
        """Cut this rank's rows out of a tensor (columns, …)."""
        return columns if self.world_size == 1 else torch.cat([self.mine(view) for view in columns.chunk(2)])

    def gather(self, part: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        """Put together parts (n, …) of all ranks, without gradient; n is ``sizes[rank]``, by default ``local``."""
        return part if self.world_size == 1 else gather(part, sizes or self.sizes)

    def gather_rows(self, part: Tensor) -> Tensor:
        """Put together parts (views · local, …) of all ranks, view by view: (views · size, …), without gradient."""
        if self.world_size == 1:
            return part
        by_sample = part.view(-1, self.local, *part.shape[1:]).transpose(0, 1)
        return self.gather(by_sample).transpose(0, 1).flatten(0, 1)

    def anywhere(self, here: bool) -> bool:
        """Tell whether something is so on any rank; all ranks must ask."""
        return here if self.world_size == 1 else any(there for (there,) in exchange([int(here)], self.rows.device))

    def some_ids(self, ids: Tensor) -> Tensor:
        """Return ``ids``, or where there are none one of this rank's own samples', to be encoded and not used.

        What `encode` calls may be a collective, as a sharded model is: if one rank calls it all must.
        """
        return ids if len(ids) else self.row_ids[:1]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a block that one rank alone may fail in, such as a call of ``encode``, fail on all ranks.

        All ranks must enter it, once: at its end they agree, and where one has failed all raise.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.world_size > 1:
            failed = [rank for rank, (ok,) in enumerate(exchange([int(error is None)], self.rows.device)) if not ok]
            raise_together(error, failed, "failed")
        elif error is not None:
            raise error


def make_pairs(
    z1: Tensor,
    z2: Tensor,
    index: Tensor | None,
    num_samples: int | None = None,
    *,
    needs_index: bool = False,
    alike: Mapping[str, object] | None = None,
) -> Pairs:
    """Validate two views (b, d), normalise them to unit vectors of at least float32, and gather them across ranks.

    Where the input of one rank is not usable, all ranks raise.

    Args:
        z1: (b, d) this rank's first views.
        z2: (b, d) second views.
        index: (b,) or (b, 2) ids, or None.
        num_samples: what ids must be below, or None.
        needs_index: refuse None for the index.
        alike: what else, by name, must be the same on all ranks: numbers, strings, None.
    """
    if not several_ranks():
        rows, index = _prepare(z1, z2, index, needs_index)
        pairs = Pairs(rows, rows, index, (len(z1),), 0)
    else:
        pairs = _make_gathered_pairs(z1, z2, index, needs_index, alike or {})
    if pairs.size < 2:
        raise ValueError(f"a batch of {pairs.size} has no negatives: give 2 samples or more (drop_last=True helps)")
    if pairs.index is not None:
        _validate_ids(pairs.index, num_samples)  # of all ranks, on all ranks: they fail together
    return pairs


def _prepare(z1: Tensor, z2: Tensor, index: Tensor | None, needs_index: bool) -> tuple[Tensor, Tensor | None]:
    """Return this rank's rows and ids, valid."""
    if index is None and needs_index:
        raise ValueError("this loss needs index, the ids of the batch's samples: loss(z1, z2, index)")
    _validate_views(z1, z2)
    if index is not None:
        index = _validate_index(index, z1)
    size = len(z1)
    return unit_vectors(torch.cat([z1, z2]), lambda row: f"z{row // size + 1}[{row % size}]"), index


def _make_gathered_pairs(
    z1: Tensor, z2: Tensor, index: Tensor | None, needs_index: bool, alike: Mapping[str, object]
) -> Pairs:
    """Gather what all ranks have found valid; a rank that raised before the others knew would leave them waiting."""
    error, report = None, [0, 0, 0]
    try:
        rows, index = _prepare(z1, z2, index, needs_index)
        size, dim = z1.shape
        ids = 0 if index is None else index.ndim
        shapes = {"dimension d": dim, "bytes a number of float": rows.element_size(), "dimensions of index": ids}
        alike = {**alike, **shapes}
        report = [1, size, fingerprint(alike)]
    except Exception as caught:
        error = caught
    reports = exchange(report, z1.device)
    raise_together(error, [rank for rank, (ok, *_) in enumerate(reports) if not ok], "has unusable input")
    sizes = tuple(size for _, size, _ in reports)
    if 0 in sizes:
        raise ValueError(f"rank {sizes.index(0)} has an empty batch: give each rank a sample (drop_last=True helps)")
    if len({each for *_, each in reports}) > 1:
        refuse_difference(alike)
    rank = dist.get_rank()
    views = gather_with_gradient(rows.view(2, size, dim).transpose(0, 1), sizes, rank)  # (size of the batch, 2, d)
    columns = views.transpose(0, 1).reshape(-1, rows.shape[1])
    return Pairs(rows, columns, None if index is None else gather(index, sizes), sizes, rank)


def unique_ids(ids: Tensor, num_samples: int | None) -> Tensor:
    """Validate ids of any shape, as a loss is called with, and return the different ones (k,), int64."""
    _validate_tensor(ids)
    _validate_integers(ids)
    ids = torch.unique(ids.to(torch.int64))
    if len(ids):
        _validate_range(ids, num_samples)
    return ids


def _validate_views(z1: Tensor, z2: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must both be (b, d), got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if not z1.is_floating_point() or z1.dtype != z2.dtype:
        raise TypeError(f"z1 and z2 must share a floating-point dtype, got {z1.dtype} and {z2.dtype}")


def _validate_index(index: Tensor, z1: Tensor) -> Tensor:
    size = len(z1)
    _validate_tensor(index)
    if index.shape not in ((size,), (size, 2)):
        raise ValueError(f"index must be ({size},), or ({size}, 2) with an id a view, got {tuple(index.shape)}")
    _validate_integers(index)
    return index.to(z1.device, torch.int64)


def _validate_tensor(index: object) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor of integers, got {type(index).__name__}")


def _validate_integers(index: Tensor) -> None:
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index must hold integers, got {index.dtype}")


def _validate_ids(index: Tensor, num_samples: int | None) -> None:
    ordered = index.flatten().sort().values
    _validate_range(ordered, num_samples)
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        value = int(ordered[1:][repeated][0])
        raise ValueError(f"index {value} occurs more than once in the batch: draw batches without replacement")


def _validate_range(ordered: Tensor, num_samples: int | None) -> None:
    if num_samples is None:
        if (ordered == -1).any():
            raise IndexError("index -1 is reserved, it marks a chain without a negative: number that sample otherwise")
        return
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or high >= num_samples:
        raise IndexError(
            f"index must be at least 0 and below num_samples={num_samples}, got {low if low < 0 else high}"
        )
