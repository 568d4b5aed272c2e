"""A momentum encoder of a tower: an exponential moving average of its weights."""

from __future__ import annotations

from copy import deepcopy

import torch
from encoders import BagEncoder
from torch import Tensor
from towers import Tower

__all__ = ["Slow"]


class Slow:
    """``slow <- momentum · slow + (1 - momentum) · fast``, each time that a batch of a side is encoded.

    Where both sides have one encoder there is one slow one, which follows with the first.

    Of a table of words the rows of that batch alone are brought up to date: the others have not changed since they were
    in one, and their average goes to them by a power of the momentum.

    Args:
        tower: the fast one.
        momentum: in (0, 1).
        first: of the other side.
    """

    def __init__(self, tower: Tower, momentum: float, first: Slow | None = None) -> None:
        self.tower, self.momentum = tower, momentum
        self.shared = first is not None and first.tower.encoder is tower.encoder
        self.encoder = first.encoder if first is not None and self.shared else deepcopy(tower.encoder)
        self.updates = 0
        self.seen: Tensor | None = None  # the update that a word's row was last brought up to
        if isinstance(tower.encoder, BagEncoder):
            self.seen = torch.zeros(len(tower.encoder.bag.weight), dtype=torch.int64)

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Follow the encoder, and encode some training pairs."""
        if not self.shared:
            self._follow(rows)
        return self.tower.by(self.encoder, rows)

    def _follow(self, rows: Tensor) -> None:
        self.updates += 1
        slow, fast = dict(self.encoder.named_parameters()), dict(self.tower.encoder.named_parameters())
        if self.seen is not None:
            self._follow_words(rows, slow.pop("bag.weight"), fast.pop("bag.weight"))
        torch._foreach_lerp_(list(slow.values()), list(fast.values()), 1 - self.momentum)

    def _follow_words(self, rows: Tensor, slow: Tensor, fast: Tensor) -> None:
        assert self.seen is not None
        content = self.tower.side.content
        words = content[self.tower.pairs[rows]][0].unique()
        left = self.momentum ** (self.updates - self.seen[words]).to(slow.dtype)
        slow[words] = torch.lerp(fast[words], slow[words], left[:, None])
        self.seen[words] = self.updates
