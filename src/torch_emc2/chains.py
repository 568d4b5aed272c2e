"""The chain table: where each sample's Markov chains stopped at its last visit."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.tables import SampleTable

__all__ = ["EMPTY", "ChainTable"]

EMPTY = -1


class ChainTable:
    """Carried negative and its log score for every chain: 8 bytes a chain (12 where ids may exceed int32).

    Args:
        num_samples: number of ids, or None for a table that grows.
        num_chains: chains an id.

    Attributes:
        ids: (num_samples, num_chains) id of the negative each chain sits at, `EMPTY` before its first visit.
        scores: (num_samples, num_chains) float32 log score of that negative when the chain stopped; -inf when empty.
    """

    def __init__(self, num_samples: int | None, num_chains: int) -> None:
        long = num_samples is None or num_samples > torch.iinfo(torch.int32).max
        self.ids = SampleTable(num_samples, (num_chains,), torch.int64 if long else torch.int32, EMPTY)
        self.scores = SampleTable(num_samples, (num_chains,), torch.float32, -torch.inf)

    def write(self, ids: Tensor, carried: Tensor, scores: Tensor) -> None:
        """Store carried ids and their log scores (k, num_chains) for samples ``ids`` (k,), all different."""
        self.ids.make_room(ids)
        self.scores.make_room(ids)  # before either is written
        self.ids.write(ids, carried)
        self.scores.write(ids, scores)

    def state(self) -> dict[str, Tensor]:
        """Return all there is to save."""
        return {"ids": self.ids.data, "scores": self.scores.data}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved `state`. Raises ValueError if it is of another size."""
        self.ids.load(state["ids"])
        self.scores.load(state["scores"])
