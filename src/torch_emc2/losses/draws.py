"""Random draws for a batch: a function of seed, call and place in the whole batch, whatever the number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.geometry import Contrast
from torch_emc2.kernels import Draws
from torch_emc2.kernels.counted import CountedDraws, compiled_kernels
from torch_emc2.ranks import Ranks
from torch_emc2.seeds import mix_seed

__all__ = ["BatchDraws", "Chances"]

_ORDER = -1  # no block has this place
_BLOCK = 64  # rows that share a seed: a rank draws the noise of the blocks that hold its rows, and no more


class Chances(NamedTuple):
    """The random choices for all rows of a batch.

    Attributes:
        sets: (sets, n) the column that is proposed at each step of each set. There are as many sets as views; each has
            one randomly chosen view of every sample, and all columns that are not the samples'. All sets are in one
            random order.
        place: (n,) the place of each sample, or further column, among a set's proposals.
        keep_in: (rows, chains) the set whose final state each chain keeps.
        keep_view: (local, chains) the view whose final state a shared chain keeps.
    """

    sets: Tensor
    place: Tensor
    keep_in: Tensor
    keep_view: Tensor


class BatchDraws:
    """The random draws of one direction of a batch.

    Where moves are compiled, on the CPU by numba and on a GPU by Triton, so are all draws. They then differ from those
    of torch's generator, with the same distribution.

    Args:
        contrast: the direction; with two towers, both directions draw differently.
        seed: the loss's seed.
        call: the number of the call.
    """

    def __init__(self, contrast: Contrast, seed: int, call: int) -> None:
        self._contrast = contrast
        self._key = mix_seed(mix_seed(seed, contrast.anchors) if contrast.anchors else seed, call)
        self._device = contrast.rows.device
        self._kernels = compiled_kernels(self._device.type)

    def of(self, rows: slice) -> Draws:
        """Return the draws of some of this rank's rows."""
        contrast, dtype = self._contrast, self._contrast.rows.dtype
        if self._kernels is not None:
            return CountedDraws(self._kernels, self._key, rows.start, rows.stop - rows.start, contrast.ranks, dtype)
        return _GeneratedDraws(self._key, rows, contrast.ranks, dtype, self._device)

    def chances(self, num_chains: int) -> Chances:
        """Draw the sets that all rows share, and the set and view that each chain keeps."""
        contrast, ranks = self._contrast, self._contrast.ranks
        views, count = contrast.column_views, ranks.size + contrast.num_further
        coins = (contrast.row_views + 1) * ranks.size * num_chains
        if self._kernels is not None:
            memory = torch.empty((views + 1) * count + coins, dtype=torch.int64, device=self._device)
            sets, place, thrown = torch.split(memory, [views * count, count, coins])
            sets = sets.view(views, count)
            self._kernels.shuffle(self._key, ranks.size, sets, place, thrown)
        else:
            generator = torch.Generator(self._device).manual_seed(mix_seed(self._key, _ORDER))
            order = torch.randperm(count, generator=generator, device=self._device)
            view = torch.randint(views, (count,), generator=generator, device=self._device)
            thrown = torch.randint(views, (coins,), generator=generator, device=self._device)
            view = torch.where(order < ranks.size, view + torch.arange(views, device=self._device)[:, None], views - 1)
            sets, place = order + view % views * ranks.size, order.argsort()
        coin_of = thrown.view(-1, ranks.size, num_chains)  # of each view, and one more
        if ranks.world_size > 1:
            coin_of = coin_of[:, ranks.start : ranks.start + ranks.local]
        return Chances(sets, place, coin_of[:-1].flatten(0, 1), coin_of[-1])


class _GeneratedDraws:
    """Draws of some rows by torch's generator, a block of rows of the whole batch at a time."""

    def __init__(self, key: int, rows: slice, ranks: Ranks, dtype: torch.dtype, device: torch.device) -> None:
        self._key, self._rows, self._ranks, self._dtype, self._device = key, rows, ranks, dtype, device
        self._times = 0

    def exponential(self, *shape: int) -> Tensor:
        """Draw finite Exp(1) numbers (rows, \\*shape)."""
        ranks, rows, drawn = self._ranks, self._rows, []
        generator = torch.Generator(self._device)
        for view in range(rows.start // ranks.local, (rows.stop - 1) // ranks.local + 1):
            before = view * ranks.local  # rows of earlier views
            first = max(rows.start - before, 0) + ranks.start
            last = min(rows.stop - before, ranks.local) + ranks.start
            blocks = range(first // _BLOCK, -(-last // _BLOCK))
            noise = torch.empty(len(blocks) * _BLOCK, *shape, dtype=self._dtype, device=self._device)
            for block, part in zip(blocks, torch.split(noise, _BLOCK), strict=True):
                part.uniform_(generator=generator.manual_seed(mix_seed(self._key, view, block, self._times)))
            drawn.append(noise[first - blocks.start * _BLOCK :][: last - first])
        self._times += 1
        noise = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        return noise.neg_().add_(1).log_().neg_()  # uniform_ draws from [0, 1): 1 - u is never 0
