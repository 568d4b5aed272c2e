"""Random draws for a batch that any number of ranks draws alike."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.pairs import Pairs
from torch_emc2.seeds import mix_seed

__all__ = ["exponential_noise", "fair_coins", "proposal_sets"]

_SETS, _COINS = -1, -2  # places of no block
_BLOCK = 256  # samples that share a seed: a rank draws the noise of the blocks that hold its samples, and no more


def exponential_noise(pairs: Pairs, shape: tuple[int, ...], seed: int, call: int) -> Tensor:
    """Finite Exp(1) draws (2, local, \\*shape) for both views of this rank's samples.

    They are a function of seed, call and place in the whole batch, on each kind of device.
    """
    first = pairs.start // _BLOCK * _BLOCK
    last = min(pairs.size, -(-(pairs.start + pairs.local) // _BLOCK) * _BLOCK)
    noise = torch.empty(2, last - first, *shape, dtype=pairs.rows.dtype, device=pairs.rows.device)
    generator = torch.Generator(noise.device)
    for place in range(first, last, _BLOCK):
        block = noise[:, place - first : place - first + _BLOCK]
        block.uniform_(generator=generator.manual_seed(mix_seed(seed, call, place)))
    noise.neg_().add_(1).log_().neg_()  # uniform_ draws from [0, 1): 1 - u is never 0, whose logarithm is infinite
    return noise if pairs.local == last - first else noise[:, pairs.start - first :][:, : pairs.local].contiguous()


def proposal_sets(pairs: Pairs, seed: int, call: int) -> Tensor:
    """Columns (2, size) of two sets that hold one view of every sample each, by a fair coin; the samples in random
    order, the same in both.
    """
    generator = torch.Generator(pairs.rows.device).manual_seed(mix_seed(seed, call, _SETS))
    sample = torch.randperm(pairs.size, generator=generator, device=pairs.rows.device)
    view = torch.randint(2, (pairs.size,), generator=generator, device=pairs.rows.device)
    return sample + torch.stack([view, 1 - view]) * pairs.size


def fair_coins(pairs: Pairs, num_chains: int, seed: int, call: int) -> Tensor:
    """Three throws of 0 or 1, int64 (3, local, num_chains), for each chain of this rank's samples."""
    generator = torch.Generator(pairs.rows.device).manual_seed(mix_seed(seed, call, _COINS))
    coins = torch.randint(2, (pairs.size, 3, num_chains), generator=generator, device=pairs.rows.device)
    return pairs.mine(coins).transpose(0, 1)
