"""What EMC² remembers of the samples of one side: where their chains stopped, and maybe their last embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from torch_emc2.losses.carried import CarriedVectors
from torch_emc2.losses.stateful import SampleMemory
from torch_emc2.memory.chains import EMPTY, ChainTable
from torch_emc2.memory.slots import Slots
from torch_emc2.memory.tables import SampleTable

__all__ = ["ChainMemory"]


class ChainMemory(SampleMemory):
    """The chains of a side, and its embeddings where they are cached; addressed by the same slots.

    Args:
        num_samples: size of the side, or None for a memory that grows.
        num_chains: chains per sample.
        num_negatives: size of the side that the negatives come from, likewise.
        scored: keep the similarity of each carried negative.
        cached: keep embeddings.
        deferred: also keep the gradient that the embeddings are owed.

    Attributes:
        chains: the chains' table.
        slots: where an id's entries lie.
        embeddings: (num_samples, d) the last embedding of each sample; None before the first one, which sets d.
        owed: (num_samples, d) gradient at the embeddings that waits for the samples' next visit; None before the first.
    """

    def __init__(
        self,
        num_samples: int | None,
        num_chains: int,
        *,
        num_negatives: int | None,
        scored: bool,
        cached: bool,
        deferred: bool,
    ) -> None:
        self.num_samples, self.cached, self.deferred = num_samples, cached, deferred
        self.slots = Slots(num_samples)
        self.chains = ChainTable(num_samples, num_chains, num_negatives=num_negatives, scored=scored)
        self.embeddings: SampleTable | None = None
        self.owed: SampleTable | None = None

    def recall(self, ids: Tensor, like: Tensor) -> CarriedVectors | None:
        """Look up the cached embeddings (\\*ids.shape, d) of ``ids``, some `EMPTY`; None if nothing is cached."""
        if self.embeddings is None:
            return None
        slots = self.slots.find(ids.flatten()).clamp(min=0)  # what an empty chain meets has no weight
        return CarriedVectors(self._vectors(self.embeddings, slots, like).view(*ids.shape, -1))

    def remembered(self, count: int, seed: int, batch: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Draw ids (count,) uniformly, with their cached embeddings (count, d); `EMPTY` where nothing is cached.

        Only a share of the draws is used: the share of the ids in ``batch`` (k,) that have been met before. While every
        id that comes is new, the cache holds just the last batches and not a sample of the data, and training against
        these diverges. The draws depend on the memory and ``seed`` only, and so are the same on all ranks.
        """
        if self.embeddings is None:
            return torch.full((count,), EMPTY, device=like.device), like.new_zeros(count, like.shape[1])
        drawn = self.slots.drawn(count, torch.Generator().manual_seed(seed))
        ids = drawn.to(like.device, non_blocking=True)
        slots = self.slots.find(drawn).to(like.device, non_blocking=True)
        vectors = self._vectors(self.embeddings, slots, like)
        met_before = self._vectors(self.embeddings, self.slots.find(batch), like).any(1).sum()
        used = vectors.any(1) & (torch.arange(count, device=like.device) * len(batch) < met_before * count)
        return ids.masked_fill(~used, EMPTY), vectors

    @staticmethod
    def _vectors(table: SampleTable, slots: Tensor, like: Tensor) -> Tensor:
        """(k, d) the embeddings of ``slots`` (k,), to be compared with rows ``like`` (rows, d)."""
        dim = table.data.shape[1]
        if dim != like.shape[1]:
            raise ValueError(f"x and y must be (b, {dim}) as the cached embeddings are, got d = {like.shape[1]}")
        return table.read(slots).to(like.dtype)

    def moving(
        self, ids: Tensor, ends: Tensor, similarities: Tensor | None, first: Tensor | None
    ) -> Callable[[], None]:
        """Prepare the write of where the chains of ``ids`` (k,) ended; of a repeated id only the ``first`` counts."""
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
        """Prepare the write of the embeddings (k, d) of ``ids`` (k,), all different."""
        slots = self.slots.place(ids)
        if self.embeddings is None:
            self.embeddings = self._new_table(embeddings.shape[1])
        table = self.embeddings
        table.make_room(slots)

        def write() -> None:
            self.slots.keep(ids, slots)
            table.write(slots, embeddings)

        return write

    def owed_to(self, ids: Tensor, like: Tensor) -> Tensor:
        """(k, d) the gradient that ``ids`` (k,) are owed."""
        if self.owed is None:
            return like.new_zeros(len(ids), like.shape[1])
        slots = self.slots.find(ids)
        return self.owed.read(slots).to(like.dtype)

    def owing(self, paid: Tensor, ids: Tensor, gradients: Tensor) -> Callable[[], None]:
        """Prepare the write that adds ``gradients`` (k, d) to what carried ``ids`` (k,), some `EMPTY`, are owed.

        The batch's ids ``paid`` (n,) receive what they were owed in this step; their entries are cleared first.
        """
        if self.owed is None:
            self.owed = self._new_table(gradients.shape[1])
        table = self.owed

        def write() -> None:  # all are cached by now, and have slots
            slots = self.slots.find(paid)
            table.make_room(slots)
            table.erase(slots)
            table.add(self.slots.find(ids).clamp(min=0), gradients)  # an empty chain's is zero, wherever it is added

        return write

    def _new_table(self, dim: int) -> SampleTable:
        return SampleTable(self.num_samples, (dim,), torch.float32, 0.0)

    def state(self) -> dict[str, Any]:
        """Return chains, embeddings, and the keys of a memory that grows."""
        keys, slots = self.slots.keys()
        embeddings = None if self.embeddings is None else self.embeddings.state(slots)
        state = {"keys": keys, "chains": self.chains.state(slots), "embeddings": embeddings}
        if self.deferred:
            state["owed"] = None if self.owed is None else self.owed.state(slots)
        return state

    def check(self, state: dict[str, Any]) -> None:
        """See `Memory.check`."""
        self.slots.check(state["keys"], *state["chains"].values())
        self.chains.check(state["chains"])
        if self.cached:
            self._table_for(state, "embeddings")
        if self.deferred:
            self._table_for(state, "owed")
            shapes = {getattr(state[name], "shape", None) for name in ("embeddings", "owed")}
            if len(shapes) > 1:
                raise ValueError("the saved embeddings and what they are owed are not alike: the state is damaged")

    def load(self, state: dict[str, Any]) -> None:
        """See `Memory.load`."""
        self.embeddings = self._loaded(state, "embeddings") if self.cached else None
        self.owed = self._loaded(state, "owed") if self.deferred else None
        self.slots.load(state["keys"])
        self.chains.load(state["chains"])

    def _loaded(self, state: dict[str, Any], name: Literal["embeddings", "owed"]) -> SampleTable | None:
        table = self._table_for(state, name)
        if table is not None:
            table.load(state[name])
        return table

    def _table_for(self, state: dict[str, Any], name: Literal["embeddings", "owed"]) -> SampleTable | None:
        """Return a table that saved vectors fit in, or raise ValueError."""
        saved = state[name]
        if saved is None:
            return None
        if not isinstance(saved, Tensor) or saved.ndim != 2:
            raise ValueError(f"the saved {name} are not (n, d): the state is damaged")
        table: SampleTable | None = getattr(self, name)
        if table is None or table.data.shape[1:] != saved.shape[1:]:
            table = self._new_table(saved.shape[1])
        table.check(saved)
        self.slots.check(state["keys"], saved)
        return table

    def forget(self, ids: Tensor) -> None:
        """Empty the chains of ``ids``, and drop their embeddings."""
        slots = self.slots.forget(ids)
        self.chains.erase(slots)
        for table in (self.embeddings, self.owed):
            if table is not None:
                table.erase(slots)

    def forget_negatives(self, ids: Tensor) -> None:
        """Empty the chains that sit at one of ``ids``."""
        self.chains.leave(ids)
