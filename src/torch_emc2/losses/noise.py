"""Random draws for a batch that any number of ranks draws alike."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.pairs import Pairs
from torch_emc2.seeds import mix_seed

__all__ = ["exponential_noise", "proposal_order"]

_ORDER = -1  # the place of no block
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


def proposal_order(pairs: Pairs, seed: int, call: int) -> Tensor:
    """The column (columns,) that each step proposes: of each sample one view among the first half, the other among the
    last, which of them by a fair coin. It is its own inverse.

    In a fixed order a burn-in of one half would count second views only.
    """
    generator = torch.Generator(pairs.rows.device).manual_seed(mix_seed(seed, call, _ORDER))
    swap = torch.randint(2, (pairs.size,), generator=generator, device=pairs.rows.device) * pairs.size
    return torch.arange(2 * pairs.size, device=swap.device) + torch.cat([swap, -swap])
