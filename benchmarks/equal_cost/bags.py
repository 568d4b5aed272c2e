"""Texts as bags of hashed words and of their 3- and 4-grams."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["BUCKETS", "Bags"]

BUCKETS = 2**17


@cache
def _tokens(word: str) -> list[int]:
    """A word's own bucket, and those of its 3- and 4-grams, whose ends are marked."""
    marked = f"<{word}>"
    grams = [marked[i : i + n] for n in (3, 4) for i in range(len(marked) - n + 1)]
    return [zlib.crc32(text.encode()) % BUCKETS for text in (word, *grams)]


class Bags:
    """Texts; ``bags[rows]`` are the tokens of some, one after the other, and where each begins, for `EmbeddingBag`.

    Args:
        texts: at least one word each.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        each = [[token for word in re.findall(r"\w+", text.lower()) for token in _tokens(word)] for text in texts]
        self.tokens = torch.tensor([token for tokens in each for token in tokens])
        self.lengths = torch.tensor([len(tokens) for tokens in each])
        self.starts = self.lengths.cumsum(0) - self.lengths

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        lengths = self.lengths[rows]
        begins = lengths.cumsum(0) - lengths
        shift = (self.starts[rows] - begins).repeat_interleave(lengths)
        return self.tokens[torch.arange(len(shift)) + shift], begins
