"""Seeds as a function of what they are for, so that a random draw leaves no generator state to be saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = ["mix_seed", "own_generator", "scrambled", "shifted"]


def mix_seed(*words: int) -> int:
    """A 64-bit number in which every bit of every word counts, chained through the finaliser of splitmix64.

    torch's CPU generator takes 32 bits of a seed, so neighbouring words must not give neighbouring seeds.
    """
    mask = (1 << 64) - 1
    state = 0
    for word in words:
        state = ((state ^ word & mask) + 0x9E3779B97F4A7C15) & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state


def scrambled(words: Tensor) -> Tensor:
    """The finaliser of splitmix64, of int64 words as if they had no sign."""
    words = (words ^ shifted(words, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    words = (words ^ shifted(words, 27)) * (0x94D049BB133111EB - (1 << 64))
    return words ^ shifted(words, 31)


def shifted(words: Tensor, by: int) -> Tensor:
    """Shift int64 words to the right without their sign, which torch's own shift copies."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def own_generator() -> Generator:
    """Return a generator for a `DataLoader`, which otherwise seeds its workers with a draw from the caller's.

    It is on the default device, where the loader draws.
    """
    import torch

    return torch.Generator(torch.empty(()).device)
