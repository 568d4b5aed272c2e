"""The chain table: where each sample's Markov chains stopped at its last visit."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.kernels import EMPTY
from torch_emc2.memory.tables import SampleTable

__all__ = ["EMPTY", "ChainTable"]

_CHUNK = 1 << 20  # samples whose chains are looked through at once


class ChainTable:
    """The carried negative of every chain and, if ``scored``, its similarity.

    They take 4 bytes each per chain, the id 8 where it may exceed int32. Similarities are stored instead of log scores
    because the temperature may have changed by the next visit.

    Args:
        num_samples: number of samples, or None for a table that grows.
        num_chains: chains per sample.
        num_negatives: what the ids that chains sit at are below: with two towers, the size of the other side; or None.
        scored: keep similarities.

    Attributes:
        ids: (num_samples, num_chains) id of the negative each chain sits at, `EMPTY` before its first visit.
        similarities: (num_samples, num_chains) float32, similarity to that negative when the chain stopped, -inf when
            empty; None if they are not kept.
    """

    def __init__(
        self, num_samples: int | None, num_chains: int, *, num_negatives: int | None, scored: bool = True
    ) -> None:
        long = num_negatives is None or num_negatives > torch.iinfo(torch.int32).max
        self.ids = SampleTable(num_samples, (num_chains,), torch.int64 if long else torch.int32, EMPTY)
        self.similarities: SampleTable | None = None
        if scored:
            self.similarities = SampleTable(num_samples, (num_chains,), torch.float32, -torch.inf)

    @property
    def _tables(self) -> dict[str, SampleTable]:
        kept = {} if self.similarities is None else {"similarities": self.similarities}
        return {"ids": self.ids, **kept}

    def make_room(self, slots: Tensor) -> None:
        """Prepare for a write to ``slots``."""
        for table in self._tables.values():
            table.make_room(slots)

    def write(self, slots: Tensor, carried: Tensor, similarities: Tensor | None = None) -> None:
        """Store carried ids and their similarities (k, num_chains) in ``slots`` (k,), all different."""
        self.make_room(slots)  # in all tables before one is written
        self.ids.write(slots, carried)
        if self.similarities is not None:
            assert similarities is not None
            self.similarities.write(slots, similarities)

    def erase(self, slots: Tensor) -> None:
        """Empty the chains of ``slots``."""
        for table in self._tables.values():
            table.erase(slots)

    def leave(self, ids: Tensor) -> None:
        """Empty the chains that sit at one of ``ids``: O(num_samples), in chunks."""
        for start in range(0, len(self.ids.data), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            gone = torch.isin(self.ids.data[chunk], ids.to(self.ids.data))
            for table in self._tables.values():
                table.data[chunk].masked_fill_(gone, table.fill)

    def state(self, slots: Tensor | None = None) -> dict[str, Tensor]:
        """Return everything to save; of tables that grow, the entries of ``slots``."""
        return {name: table.state(slots) for name, table in self._tables.items()}

    def check(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError if a saved `state` is of another size."""
        for name, table in self._tables.items():
            table.check(state[name])

    def load(self, state: dict[str, Tensor]) -> None:
        """Load a saved `state`. Raises ValueError if it is of another size."""
        self.check(state)
        for name, table in self._tables.items():
            table.load(state[name])
