"""Noise for a batch's rows that any number of ranks draws alike."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.metropolis import fill_exponential
from torch_emc2.pairs import Pairs
from torch_emc2.seeds import mix_seed

__all__ = ["batch_noise"]

_BLOCK = 256  # samples that share a seed: a rank draws the noise of the blocks that hold its samples, and no more


def batch_noise(pairs: Pairs, shape: tuple[int, ...], seed: int, call: int) -> Tensor:
    """Exp(1) draws (2, local, \\*shape) for both views of this rank's samples: a function of seed, call and place in the batch."""
    first = pairs.start // _BLOCK * _BLOCK
    last = min(pairs.size, -(-(pairs.start + pairs.local) // _BLOCK) * _BLOCK)
    noise = torch.empty(2, last - first, *shape, dtype=pairs.rows.dtype, device=pairs.rows.device)
    for view in range(2):
        for place, block in zip(range(first, last, _BLOCK), noise[view].split(_BLOCK), strict=True):
            fill_exponential(block, mix_seed(seed, call, view, place))
    return noise[:, pairs.start - first :][:, : pairs.local].contiguous()
