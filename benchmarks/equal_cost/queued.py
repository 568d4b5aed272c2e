"""Embeddings of past batches as further negatives: cross-batch memory (Wang et al. 2020), or MoCo (He et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from momentum import Slow
from torch import Tensor, nn
from towers import Tower

from torch_emc2 import InfoNCELoss

if TYPE_CHECKING:
    from methods import Given

__all__ = ["queued"]

LENGTH = 2048


class _Queue:
    """The last embeddings of one side; of keys, by their own encoder or by one that follows it."""

    def __init__(self, tower: Tower, momentum: float | None) -> None:
        self.slow = None if momentum is None else Slow(tower, momentum)
        self.vectors: Tensor | None = None
        self.ids: Tensor | None = None

    def keys(self, rows: Tensor, own: Tensor) -> Tensor:
        """Embed the batch as keys: what its queries are, with gradient, or a momentum encoder's."""
        return own if self.slow is None else self.slow(rows)

    def push(self, keys: Tensor, ids: Tensor) -> None:
        keys = nn.functional.normalize(keys.detach())
        self.vectors = keys if self.vectors is None else torch.cat([self.vectors, keys])[-LENGTH:]
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids])[-LENGTH:]


def queued(given: Given, momentum: float | None, positive_weight: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Train against the batch and two queues."""
    sides = given.x, given.y
    queues = [_Queue(tower, momentum) for tower in sides]
    loss_fn = InfoNCELoss(given.temperature, positive_weight=positive_weight, towers=2, directions="x->y")

    def direction(rows: Tensor, own: list[Tensor], keys: list[Tensor], a: int, b: int) -> Tensor:
        queue = queues[b]
        hard = {"hard": queue.vectors, "hard_index": queue.ids}
        return loss_fn(own[a], keys[b], sides[a].ids[rows], y_index=sides[b].ids[rows], **hard)

    def step(rows: Tensor) -> Tensor:
        own = [tower(rows) for tower in sides]
        keys = [queue.keys(rows, each) for queue, each in zip(queues, own, strict=True)]
        loss = (direction(rows, own, keys, 0, 1) + direction(rows, own, keys, 1, 0)) / 2
        loss.backward()
        for queue, each, tower in zip(queues, keys, sides, strict=True):
            queue.push(each, tower.ids[rows])
        return loss.detach()

    return step
