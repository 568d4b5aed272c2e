"""Ids for texts that have none: the same tokens again are the same item."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["text_ids"]


def text_ids(tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(b,) int64, never -1, a hash of each text's tokens (b, length) in their order.

    What the mask (b, length) leaves out does not count, on whichever side it is; without a mask all count. Of n texts
    two different ones share an id with a chance of about n² / 2⁶⁵.
    """
    seen = torch.ones_like(tokens) if attention_mask is None else (attention_mask != 0).long()
    position = seen.cumsum(1)
    hashes = _mixed(_mixed(tokens.long()) + position)
    ids = _mixed((hashes * seen).sum(1) + seen.sum(1))
    return ids.masked_fill_(ids == -1, 0)  # which marks an empty chain


def _mixed(words: Tensor) -> Tensor:
    """The step and the finaliser of splitmix64, as of unsigned words."""
    words = words + _signed(0x9E3779B97F4A7C15)
    words = (words ^ _shifted(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shifted(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, by: int) -> Tensor:
    return (words >> by) & ((1 << 64 - by) - 1)  # the shift of a signed word copies its sign


def _signed(word: int) -> int:
    return word - (1 << 64)
