"""A loss that needs a momentum encoder, with one that is a fixed function of the embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_emc2 import MomentumLoss


class Slowed(MomentumLoss):
    """Gives itself slow embeddings, row by row, so that it can be called as all losses are."""

    def forward(self, x: Tensor, y: Tensor | None = None, index: Tensor | None = None, **further: Any) -> Tensor:
        if isinstance(x, Tensor):
            slow = slow_of(x) if y is None else (slow_of(x), slow_of(y))
            further = {"slow": slow} | further
        return super().forward(x, y, index, **further)


def slow_of(z: Tensor) -> Tensor:
    """Embeddings that differ from ``z`` as those of another encoder."""
    z = z.detach()
    return z + z.roll(1, -1) / 2
