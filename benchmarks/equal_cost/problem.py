"""A retrieval problem: pairs of a query and a key, what is the same among them, and a fixed split."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

__all__ = ["Problem", "Side", "numbered", "split"]


class Side(NamedTuple):
    """The queries or the keys, one a pair.

    Attributes:
        content: ``content[rows]`` is what the encoder takes for some of them.
        ids: (n,) from 0; the same again is the same item.
    """

    content: Any
    ids: Tensor


@dataclass(frozen=True)
class Problem:
    """n pairs; every key that is paired with an item of a query's id is a positive of that query.

    Attributes:
        x: queries.
        y: keys.
        parts: the pairs of ``train``, ``validation`` and ``test``; queries of any part search all keys.
        encoders: makes those of both sides.
        epochs: of training.
        lr: to begin a search at, for batches of 32.
        temperature: likewise.
    """

    x: Side
    y: Side
    parts: dict[str, Tensor]
    encoders: Callable[[], tuple[nn.Module, nn.Module]]
    epochs: float
    lr: float
    temperature: float

    def positives(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places, in ``queries`` and in ``keys``, of all pairs of a query and a positive of it."""
        paired = _relation(self.x.ids, self.y.ids, (int(self.x.ids.max()) + 1, int(self.y.ids.max()) + 1))
        places = _relation(self.y.ids[keys], torch.arange(len(keys)), (paired.shape[1], len(keys)))
        found = (paired[self.x.ids[queries].numpy()] @ places).tocoo()
        return torch.from_numpy(found.row).long(), torch.from_numpy(found.col).long()


def numbered(items: Sequence[Hashable]) -> Tensor:
    """Give equal items the same id, from 0 in the order of appearance."""
    ids: dict[Hashable, int] = {}
    return torch.tensor([ids.setdefault(item, len(ids)) for item in items])


def split(x_ids: Tensor, y_ids: Tensor, *, validation: int, test: int, seed: int = 0) -> dict[str, Tensor]:
    """Split pairs so that no part has an item of another; so many of test and validation, or a few more."""
    shape = int(x_ids.max()) + 1, int(y_ids.max()) + 1
    edges = coo_array((np.ones(len(x_ids)), (x_ids.numpy(), shape[0] + y_ids.numpy())), (sum(shape), sum(shape)))
    count, of_node = connected_components(edges, directed=False)
    group = torch.from_numpy(of_node).long()[x_ids]
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    before = (sizes := group.bincount(minlength=count)[drawn]).cumsum(0) - sizes  # pairs of groups that come earlier
    part = torch.empty(count, dtype=torch.long)
    part[drawn] = (before >= test).long() + (before >= test + validation).long()
    return {name: (part[group] == i).nonzero()[:, 0] for i, name in enumerate(("test", "validation", "train"))}


def _relation(of: Tensor, to: Tensor, shape: tuple[int, int]) -> csr_array:
    return csr_array((np.ones(len(of), np.int32), (of.numpy(), to.numpy())), shape)
