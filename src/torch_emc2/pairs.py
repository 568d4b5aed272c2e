"""The pairs of a batch: rows (anchors), columns (candidates), and which column is whose; gathered across ranks.

With b samples in the whole batch, columns 0 … b-1 are their first views and b … 2b-1 their second ones. A rank's rows
are the first, then the second views of its own samples. A row's positive is the other view of its sample; every column
of another sample is a negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Pairs", "make_pairs"]


@dataclass(frozen=True)
class Pairs:
    """A validated, normalised, gathered batch.

    Attributes:
        rows: (2 · local, d) unit vectors of this rank's samples, with gradient.
        columns: (2 · size, d) unit vectors of all ranks' samples, with gradient.
        index: (size,) or (size, 2) int64 ids of all samples, or None where the loss needs none.
        start: position of this rank's first sample in the whole batch.
        local: samples of this rank.
        size: samples of the whole batch.
        world_size: number of ranks.
    """

    rows: Tensor
    columns: Tensor
    index: Tensor | None
    start: int
    local: int
    size: int
    world_size: int

    @property
    def num_negatives(self) -> int:
        """Negatives of each row."""
        return 2 * self.size - 2

    @property
    def own(self) -> Tensor:
        """(rows, columns) bool: the column is a view of the row's own sample."""
        return _own(self.start, self.local, self.size, self.rows.device)

    @property
    def positive(self) -> Tensor:
        """(rows,) column of each row's positive."""
        return _positive(self.start, self.local, self.size, self.rows.device)

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
        if self.world_size == 1:
            return self.column_ids
        return torch.cat([self.mine(self.view_ids(0)), self.mine(self.view_ids(1))])

    def mine(self, whole: Tensor) -> Tensor:
        """Cut this rank's part out of a tensor (size, …) over the whole batch."""
        return whole[self.start : self.start + self.local]

    def gather(self, part: Tensor) -> Tensor:
        """Put together the (local, …) parts of all ranks: (size, …), without gradient."""
        return part if self.world_size == 1 else _gather(part, _sizes(self.local, part.device))

    def gather_rows(self, part: Tensor) -> Tensor:
        """Put together parts (views · local, …) of all ranks, view by view: (views · size, …), without gradient."""
        if self.world_size == 1:
            return part
        by_sample = part.view(-1, self.local, *part.shape[1:]).transpose(0, 1)
        return self.gather(by_sample).transpose(0, 1).flatten(0, 1)


def make_pairs(z1: Tensor, z2: Tensor, index: Tensor | None, num_samples: int | None = None) -> Pairs:
    """Validate two views (b, d), normalise them to unit vectors of at least float32, and gather them across ranks."""
    _validate_views(z1, z2)
    if index is not None:
        index = _validate_index(index, z1)
    dtype = torch.promote_types(z1.dtype, torch.float32)
    rows = F.normalize(torch.cat([z1, z2]).to(dtype), dim=1)
    _validate_finite(rows)
    local = len(z1)
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size == 1:
        pairs = Pairs(rows, rows, index, 0, local, local, 1)
    else:
        sizes = _sizes(local, rows.device)
        views: Tensor = _GatherWithGradient.apply(rows.view(2, local, -1).transpose(0, 1), sizes)  # (size, 2, d)
        columns = views.transpose(0, 1).reshape(-1, rows.shape[1])
        index = None if index is None else _gather(index, sizes)
        pairs = Pairs(rows, columns, index, sum(sizes[: dist.get_rank()]), local, sum(sizes), world_size)
    if pairs.size < 2:
        raise ValueError(f"a batch of {pairs.size} has no negatives: give 2 samples or more (drop_last=True helps)")
    if pairs.index is not None:
        _validate_ids(pairs.index, num_samples)  # of all ranks, on all ranks: they fail together
    return pairs


@lru_cache(maxsize=8)
def _own(start: int, local: int, size: int, device: torch.device) -> Tensor:
    sample = torch.arange(size, device=device)
    return (sample[start : start + local, None] == sample).repeat(2, 2)


@lru_cache(maxsize=8)
def _positive(start: int, local: int, size: int, device: torch.device) -> Tensor:
    mine = torch.arange(start, start + local, device=device)
    return torch.cat([mine + size, mine])


def _sizes(local: int, device: torch.device) -> list[int]:
    mine = torch.tensor([local], device=device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, mine)
    return [int(size) for size in sizes]


def _gather(part: Tensor, sizes: list[int]) -> Tensor:
    """Concatenate tensors of different lengths, padded to the longest: some back ends gather equal shapes only."""
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _GatherWithGradient(torch.autograd.Function):
    """All ranks' tensors; the gradient of a rank's part is the sum of what all ranks send back."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _gather(part, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: dist.get_rank()])
        return total[start : start + ctx.sizes[dist.get_rank()]], None


def _validate_views(z1: Tensor, z2: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must both be (b, d), got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if not z1.is_floating_point() or z1.dtype != z2.dtype:
        raise TypeError(f"z1 and z2 must share a floating-point dtype, got {z1.dtype} and {z2.dtype}")


def _validate_index(index: Tensor, z1: Tensor) -> Tensor:
    size = len(z1)
    if index.shape not in ((size,), (size, 2)):
        raise ValueError(f"index must be ({size},), or ({size}, 2) with an id a view, got {tuple(index.shape)}")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index must hold integers, got {index.dtype}")
    return index.to(z1.device, torch.int64)


def _validate_finite(rows: Tensor) -> None:
    finite = rows.detach().sum(1).isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        view, sample = divmod(row, len(rows) // 2)
        raise ValueError(f"z{view + 1}[{sample}] is not finite: no state has changed; check the encoder's output")


def _validate_ids(index: Tensor, num_samples: int | None) -> None:
    ordered = index.flatten().sort().values
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or (num_samples is not None and high >= num_samples):
        limit = "" if num_samples is None else f" and below num_samples={num_samples}"
        raise IndexError(f"index must be at least 0{limit}, got {low if low < 0 else high}")
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        value = int(ordered[1:][repeated][0])
        raise ValueError(f"index {value} occurs more than once in the batch: draw batches without replacement")
