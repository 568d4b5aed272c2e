"""What ranks do together: tell one another numbers, agree in settings, fail, and gather tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "Ranks",
    "exchange",
    "fingerprint",
    "gather",
    "gather_with_gradient",
    "leaving_the_group",
    "raise_together",
    "refuse_difference",
    "several_ranks",
]


@dataclass(frozen=True)
class Ranks:
    """How a batch is spread over the ranks, and what they do together in a call of a loss.

    Attributes:
        sizes: samples of each rank; in the whole batch they follow one another.
        rank: this rank.
        device: where its tensors are.
    """

    sizes: tuple[int, ...]
    rank: int
    device: torch.device

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

    def mine(self, whole: Tensor) -> Tensor:
        """Cut this rank's part out of a tensor (size, …) over the whole batch."""
        return whole[self.start : self.start + self.local]

    def my_rows(self, whole: Tensor) -> Tensor:
        """Cut this rank's part out of a tensor (views · size, …), view by view: (views · local, …)."""
        if self.world_size == 1:
            return whole
        return torch.cat([self.mine(view) for view in torch.split(whole, self.size)])

    def gather(self, part: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        """Put together parts (n, …) of all ranks, without gradient; n is ``sizes[rank]``, by default ``local``."""
        return part if self.world_size == 1 else gather(part, sizes or self.sizes)

    def gather_rows(self, part: Tensor) -> Tensor:
        """Put together parts (views · local, …) of all ranks, view by view: (views · size, …), without gradient."""
        return part if self.world_size == 1 else _by_view(self.gather(_by_sample(part, self.local)))

    def gather_rows_with_gradient(self, part: Tensor) -> Tensor:
        """Do the same with gradient."""
        if self.world_size == 1:
            return part
        return _by_view(gather_with_gradient(_by_sample(part, self.local), self.sizes, self.rank))

    def anywhere(self, here: bool) -> bool:
        """Tell whether something is so on any rank; all ranks must ask."""
        return here if self.world_size == 1 else any(there for (there,) in exchange([int(here)], self.device))

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
            failed = [rank for rank, (ok,) in enumerate(exchange([int(error is None)], self.device)) if not ok]
            raise_together(error, failed, "failed")
        elif error is not None:
            raise error


def several_ranks() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def leaving_the_group() -> Iterator[None]:
    """Leave the process group, if one was joined, where the work ends well: its threads may abort a process's end.

    Where it fails the other ranks may not know yet, and leaving might wait for them.
    """
    try:
        yield
    except SystemExit:  # by SIGTERM, of all ranks together
        _leave()
        raise
    _leave()


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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


def _by_sample(rows: Tensor, size: int) -> Tensor:
    """(views · size, …) to (size, views, …)."""
    return rows.view(-1, size, *rows.shape[1:]).transpose(0, 1)


def _by_view(samples: Tensor) -> Tensor:
    """(size, views, …) to (views · size, …)."""
    return samples.transpose(0, 1).flatten(0, 1)


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
