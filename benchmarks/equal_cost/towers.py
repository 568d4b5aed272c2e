"""Both encoders over the training pairs, and how much is encoded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from problem import Problem, Side
from torch import Tensor, nn

__all__ = ["Tower", "towers"]


@dataclass(eq=False)
class Tower:
    """One side of the training pairs, numbered from 0.

    Attributes:
        encoder: of the side.
        side: all of the problem's.
        pairs: those of training.
        ids: (n,) of each training pair's item, from 0.
        first: (items,) the first training pair that has the item.
        passes: rows that have gone through the encoder forward, and backward.
    """

    encoder: nn.Module
    side: Side
    pairs: Tensor
    ids: Tensor = field(init=False)
    first: Tensor = field(init=False)
    passes: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        items, self.ids = torch.unique(self.side.ids[self.pairs], return_inverse=True)
        places = torch.arange(len(self.pairs))
        self.first = torch.full_like(items, len(places)).scatter_reduce(0, self.ids, places, "amin")

    def __call__(self, rows: Tensor) -> Tensor:
        """Encode some training pairs' content."""
        return self.by(self.encoder, rows)

    def of_items(self, ids: Tensor) -> Tensor:
        """Encode items."""
        return self(self.first[ids])

    def by(self, encoder: nn.Module, rows: Tensor) -> Tensor:
        """Encode with another encoder, such as a momentum encoder."""
        self.passes[0] += len(rows)
        self.passes[1] += len(rows) * torch.is_grad_enabled()
        return encoder(self.side.content[self.pairs[rows]])


def towers(problem: Problem) -> tuple[Tower, Tower]:
    """Make new ones of a problem."""
    x, y = problem.encoders()
    return Tower(x, problem.x, problem.parts["train"]), Tower(y, problem.y, problem.parts["train"])
