"""Ids for texts that have none: equal tokens are the same item."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.seeds import scrambled

__all__ = ["text_ids"]


def text_ids(tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(b,) int64, never -1, a hash of each text's tokens (b, length) in their order.

    Tokens that the mask (b, length) leaves out do not count, on whichever side they are; without a mask all count.
    Among n texts, the chance that two different ones share an id is about n² / 2⁶⁵.
    """
    seen = torch.ones_like(tokens) if attention_mask is None else (attention_mask != 0).long()
    position = seen.cumsum(1)
    hashes = _mixed(_mixed(tokens.long()) + position)
    ids = _mixed((hashes * seen).sum(1) + seen.sum(1))
    return ids.masked_fill_(ids == -1, 0)  # -1 marks an empty chain


def _mixed(words: Tensor) -> Tensor:
    return scrambled(words + (0x9E3779B97F4A7C15 - (1 << 64)))  # a step of splitmix64
