"""GISTEmbed (Solatorio 2024): without the negatives that a guide finds nearer than the positive."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from towers import Tower

if TYPE_CHECKING:
    from methods import Given

__all__ = ["guided"]


def guided(given: Given) -> Callable[[Tensor], Tensor]:
    """Train as sentence-transformers' GISTEmbedLoss does; the guide is the encoders as they come."""
    sides = given.x, given.y
    guides = deepcopy([tower.encoder for tower in sides])

    def by_guide(tower: Tower, guide: torch.nn.Module, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return tower.by(guide, rows)

    def step(rows: Tensor) -> Tensor:
        own = _scores(*(tower(rows) for tower in sides))
        guide = _scores(*map(by_guide, sides, guides, (rows, rows)))
        nearer = guide > guide.diagonal()[:, None]
        loss = cross_entropy(
            (own / given.temperature).masked_fill(nearer, -math.inf), torch.arange(len(rows), device=own.device)
        )
        loss.backward()
        return loss.detach()

    return step


def _scores(x: Tensor, y: Tensor) -> Tensor:
    """Score queries against keys and queries, and each row's key against keys: (b, 3 b), positives on the diagonal.

    An embedding against itself is 1 for a guide, and falls out.
    """
    x, y = normalize(x), normalize(y)
    return torch.cat([x @ y.T, x @ x.T, y @ y.T], 1)
