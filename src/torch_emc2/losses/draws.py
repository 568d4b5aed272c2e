"""Random draws for a batch that any number of ranks draws alike: a function of seed, call and place in the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.geometry import Contrast
from torch_emc2.seeds import mix_seed

__all__ = ["BatchDraws"]

_SETS, _COINS = -1, -2  # places of no block
_BLOCK = 256  # samples that share a seed: a rank draws the noise of the blocks that hold its samples, and no more


class BatchDraws:
    """What chance decides for one direction of a batch, on each kind of device.

    Args:
        contrast: the direction; both of two towers draw differently.
        seed: of the loss.
        call: its number.
    """

    def __init__(self, contrast: Contrast, seed: int, call: int) -> None:
        self._contrast = contrast
        self._words = (mix_seed(seed, contrast.anchors) if contrast.anchors else seed, call)
        self._times = 0  # that noise was drawn

    def exponential(self, *shape: int) -> Tensor:
        """Finite Exp(1) draws (rows, \\*shape) for the rows of this rank; each time others."""
        ranks, rows = self._contrast.ranks, self._contrast.rows
        first = ranks.start // _BLOCK * _BLOCK
        last = min(ranks.size, -(-(ranks.start + ranks.local) // _BLOCK) * _BLOCK)
        noise = torch.empty(self._contrast.row_views, last - first, *shape, dtype=rows.dtype, device=rows.device)
        generator = torch.Generator(noise.device)
        again = (self._times,) if self._times else ()
        for place in range(first, last, _BLOCK):
            block = noise[:, place - first : place - first + _BLOCK]
            block.uniform_(generator=generator.manual_seed(mix_seed(*self._words, place, *again)))
        self._times += 1
        noise.neg_().add_(1).log_().neg_()  # uniform_ draws from [0, 1): 1 - u is never 0, whose logarithm is infinite
        if ranks.local < last - first:
            noise = noise[:, ranks.start - first :][:, : ranks.local].contiguous()
        return noise.flatten(0, 1)

    def proposal_sets(self) -> Tensor:
        """Columns (sets, n) of sets that hold one view of every sample each and all hard negatives, in random order.

        There are as many sets as views of a sample; which has which is drawn. The order is the same in all.
        """
        contrast, size = self._contrast, self._contrast.ranks.size
        views, count = contrast.column_views, size + contrast.num_hard
        generator = self._generator(_SETS)
        place = torch.randperm(count, generator=generator, device=contrast.rows.device)
        view = torch.randint(views, (count,), generator=generator, device=contrast.rows.device)
        in_set = torch.arange(views, device=contrast.rows.device)[:, None]
        sets = place + (view + in_set) % views * size
        if contrast.num_hard:
            sets = torch.where(place < size, sets, place + (views - 1) * size)
        return sets

    def coins(self, num_chains: int) -> Tensor:
        """Throws from 0 to views - 1, int64 (views + 1, local, num_chains), for each chain of this rank's samples.

        One for each of its views and one more.
        """
        contrast, views = self._contrast, self._contrast.column_views
        shape = contrast.ranks.size, views + 1, num_chains
        coins = torch.randint(views, shape, generator=self._generator(_COINS), device=contrast.rows.device)
        return contrast.ranks.mine(coins).transpose(0, 1)

    def _generator(self, place: int) -> torch.Generator:
        return torch.Generator(self._contrast.rows.device).manual_seed(mix_seed(*self._words, place))
