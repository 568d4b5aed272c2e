"""What ranks do together: tell one another numbers, agree in settings, fail, and gather tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "exchange",
    "fingerprint",
    "gather",
    "gather_with_gradient",
    "raise_together",
    "refuse_difference",
    "several_ranks",
]


def several_ranks() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def exchange(numbers: list[int], device: torch.device) -> list[list[int]]:
    """Tell all ranks some numbers and return theirs."""
    mine = torch.tensor(numbers, device=device)
    all_numbers = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_numbers, mine)
    return [row.tolist() for row in all_numbers]


def fingerprint(alike: Mapping[str, object]) -> int:
    """Return 64 bits that tell whether ranks agree in all of ``alike``, by name."""
    return int.from_bytes(hashlib.blake2b(repr(alike).encode(), digest_size=8).digest(), signed=True)


def refuse_difference(alike: Mapping[str, object]) -> NoReturn:
    """Raise ValueError, on all ranks, that names the first thing in ``alike`` which is not alike."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, {name: repr(value) for name, value in alike.items()})
    zero = by_rank[0]
    name, rank = next(
        (name, rank) for rank, other in enumerate(by_rank) for name in zero if zero[name] != other.get(name)
    )
    raise ValueError(
        f"ranks must agree in {name}: rank 0 has {zero[name]}, rank {rank} {by_rank[rank].get(name)}; "
        "no state has changed"
    )


def raise_together(error: Exception | None, failed: list[int], what: str) -> None:
    """Raise this rank's own error, or that another one has."""
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"rank {failed[0]} {what} (its own error says what); no state has changed")


def gather(part: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Concatenate tensors of different lengths, padded to the longest: some back ends gather equal shapes only."""
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_with_gradient(part: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    """Concatenate all ranks' tensors; the gradient of a rank's part is the sum of what all ranks send back."""
    whole: Tensor = _GatherWithGradient.apply(part, sizes, rank)
    return whole


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        return gather(part, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: ctx.rank])
        return total[start : start + ctx.sizes[ctx.rank]], None, None
