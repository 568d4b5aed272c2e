"""The chain table: where each sample's Markov chains stopped at its last visit."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.tables import SampleTable

__all__ = ["EMPTY", "ChainTable"]

EMPTY = -1
_CHUNK = 1 << 20  # samples whose chains are looked through at once


class ChainTable:
    """Carried negative and its similarity for every chain: 8 bytes a chain (12 where ids may exceed int32).

    A log score is the similarity divided by the temperature, which may have changed by the next visit.

    Args:
        num_samples: number of samples, or None for a table that grows.
        num_chains: chains a sample.

    Attributes:
        ids: (num_samples, num_chains) id of the negative each chain sits at, `EMPTY` before its first visit.
        similarities: (num_samples, num_chains) float32, to that negative when the chain stopped; -inf when empty.
    """

    def __init__(self, num_samples: int | None, num_chains: int) -> None:
        long = num_samples is None or num_samples > torch.iinfo(torch.int32).max
        self.ids = SampleTable(num_samples, (num_chains,), torch.int64 if long else torch.int32, EMPTY)
        self.similarities = SampleTable(num_samples, (num_chains,), torch.float32, -torch.inf)

    def make_room(self, slots: Tensor) -> None:
        """Be ready for a write to ``slots``."""
        self.ids.make_room(slots)
        self.similarities.make_room(slots)

    def write(self, slots: Tensor, carried: Tensor, similarities: Tensor) -> None:
        """Store carried ids and their similarities (k, num_chains) in ``slots`` (k,), all different."""
        self.make_room(slots)  # in both before either is written
        self.ids.write(slots, carried)
        self.similarities.write(slots, similarities)

    def forget(self, ids: Tensor, slots: Tensor) -> None:
        """Empty the chains of ``slots``, and all that sit at one of ``ids``: O(num_samples), in chunks."""
        self.ids.erase(slots)
        self.similarities.erase(slots)
        tables = (torch.split(table.data, _CHUNK) for table in (self.ids, self.similarities))
        for carried, similarities in zip(*tables, strict=True):
            gone = torch.isin(carried, ids.to(carried))
            carried.masked_fill_(gone, EMPTY)
            similarities.masked_fill_(gone, -torch.inf)

    def state(self, slots: Tensor | None = None) -> dict[str, Tensor]:
        """Return all there is to save; of tables that grow the entries of ``slots``."""
        return {"ids": self.ids.state(slots), "similarities": self.similarities.state(slots)}

    def check(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError where a saved `state` is of another size."""
        self.ids.check(state["ids"])
        self.similarities.check(state["similarities"])

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved `state`. Raises ValueError if it is of another size."""
        self.check(state)
        self.ids.load(state["ids"])
        self.similarities.load(state["similarities"])
