"""What EMC² remembers of the samples of one side: where their chains stopped, and maybe their last embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_emc2.losses.met import Met
from torch_emc2.losses.stateful import Memory
from torch_emc2.memory.chains import ChainTable
from torch_emc2.memory.slots import Slots
from torch_emc2.memory.tables import SampleTable

__all__ = ["ChainMemory"]


class ChainMemory(Memory):
    """The chains of a side, and its embeddings where they are cached; addressed by the same slots.

    Args:
        num_samples: size of the side, or None for a memory that grows.
        num_chains: chains a sample.
        scored: keep the similarity of each carried negative.
        cached: keep embeddings.

    Attributes:
        chains: the chains' table.
        slots: where an id's entries lie.
        embeddings: (num_samples, d) the last of each sample; None before the first, whose d is all of theirs.
    """

    def __init__(self, num_samples: int | None, num_chains: int, *, scored: bool, cached: bool) -> None:
        self.num_samples, self.cached = num_samples, cached
        self.slots = Slots(num_samples)
        self.chains = ChainTable(num_samples, num_chains, scored=scored)
        self.embeddings: SampleTable | None = None

    def recall(self, ids: Tensor, like: Tensor) -> Met | None:
        """Look up the cached embeddings (\\*ids.shape, d) of ``ids``, some `EMPTY`; None if there are none."""
        if self.embeddings is None:
            return None
        dim = self.embeddings.data.shape[1]
        if dim != like.shape[1]:
            raise ValueError(f"x and y must be (b, {dim}) as the cached embeddings are, got d = {like.shape[1]}")
        slots = self.slots.find(ids.flatten()).clamp(min=0)  # what an empty chain meets has no weight
        return Met(self.embeddings.read(slots).to(like.dtype).view(*ids.shape, dim))

    def moving(
        self, ids: Tensor, ends: Tensor, similarities: Tensor | None, first: Tensor | None
    ) -> Callable[[], None]:
        """Be ready to write where the chains of ``ids`` (k,) ended, of each one that is met ``first``."""
        if first is not None:
            ids, ends = ids[first], ends[first]
            similarities = None if similarities is None else similarities[first]
        slots = self.slots.place(ids)
        self.chains.make_room(slots)

        def write() -> None:
            self.slots.keep(ids, slots)
            self.chains.write(slots, ends, similarities)

        return write

    def caching(self, ids: Tensor, embeddings: Tensor) -> Callable[[], None]:
        """Be ready to keep the embeddings (k, d) of ``ids`` (k,), all different."""
        slots = self.slots.place(ids)
        if self.embeddings is None:
            self.embeddings = SampleTable(self.num_samples, (embeddings.shape[1],), torch.float32, 0.0)
        table = self.embeddings
        table.make_room(slots)

        def write() -> None:
            self.slots.keep(ids, slots)
            table.write(slots, embeddings)

        return write

    def state(self) -> dict[str, Any]:
        """Return chains, embeddings, and the keys of a memory that grows."""
        keys, slots = self.slots.keys()
        embeddings = None if self.embeddings is None else self.embeddings.state(slots)
        return {"keys": keys, "chains": self.chains.state(slots), "embeddings": embeddings}

    def check(self, state: dict[str, Any]) -> None:
        """See `Memory.check`."""
        self.slots.check(state["keys"], *state["chains"].values())
        self.chains.check(state["chains"])
        if self.cached:
            self._table_for(state)

    def load(self, state: dict[str, Any]) -> None:
        """See `Memory.load`."""
        table = self._table_for(state) if self.cached else None
        if table is not None:
            table.load(state["embeddings"])
        self.embeddings = table
        self.slots.load(state["keys"])
        self.chains.load(state["chains"])

    def _table_for(self, state: dict[str, Any]) -> SampleTable | None:
        """Return a table that saved embeddings fit in, or raise ValueError."""
        embeddings = state["embeddings"]
        if embeddings is None:
            return None
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
            raise ValueError("the saved embeddings are not (n, d): the state is damaged")
        table = self.embeddings
        if table is None or table.data.shape[1:] != embeddings.shape[1:]:
            table = SampleTable(self.num_samples, tuple(embeddings.shape[1:]), torch.float32, 0.0)
        table.check(embeddings)
        self.slots.check(state["keys"], embeddings)
        return table

    def forget(self, ids: Tensor) -> None:
        """Empty the chains of ``ids``, and drop their embeddings."""
        slots = self.slots.forget(ids)
        self.chains.erase(slots)
        if self.embeddings is not None:
            self.embeddings.erase(slots)

    def forget_negatives(self, ids: Tensor) -> None:
        """Empty the chains that sit at one of ``ids``."""
        self.chains.leave(ids)
