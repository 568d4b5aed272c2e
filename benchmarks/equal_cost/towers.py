"""Both encoders over the training pairs, and how much is encoded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from problem import Problem, Side
from torch import Tensor, nn

__all__ = ["Tower", "on", "towers"]


@dataclass(eq=False)
class Tower:
    """One side of the training pairs, numbered from 0.

    Attributes:
        encoder: of the side.
        side: all of the problem's.
        pairs: those of training.
        ids: (n,) of each training pair's item, from 0.
        first: (items,) the first training pair that has the item.
        device: of the encoder.
        passes: rows that have gone through the encoder forward, and backward.
    """

    encoder: nn.Module
    side: Side
    pairs: Tensor
    device: str
    ids: Tensor = field(init=False)
    first: Tensor = field(init=False)
    passes: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        items, ids = torch.unique(self.side.ids[self.pairs], return_inverse=True)
        places = torch.arange(len(self.pairs))
        self.first = torch.full_like(items, len(places)).scatter_reduce(0, ids, places, "amin")
        self.ids = ids.to(self.device)

    def __call__(self, rows: Tensor) -> Tensor:
        """Encode some training pairs' content."""
        return self.by(self.encoder, rows)

    def of_items(self, ids: Tensor) -> Tensor:
        """Encode items."""
        return self(self.first[ids.cpu()])

    def by(self, encoder: nn.Module, rows: Tensor) -> Tensor:
        """Encode with another encoder, such as a momentum encoder."""
        self.passes[0] += len(rows)
        self.passes[1] += len(rows) * torch.is_grad_enabled()
        return encoder(on(self.device, self.side.content[self.pairs[rows]]))


def on(device: str, content: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Take an encoder's input to a device."""
    return content.to(device) if isinstance(content, Tensor) else tuple(each.to(device) for each in content)


def towers(problem: Problem, device: str) -> tuple[Tower, Tower]:
    """Make new ones of a problem."""
    x, y = (encoder.to(device) for encoder in problem.encoders())
    train = problem.parts["train"]
    return Tower(x, problem.x, train, device), Tower(y, problem.y, train, device)
