"""Where the entries of a sample lie: at its id in a table of known size, else in the order in which the ids came."""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

__all__ = ["UNKNOWN", "Slots"]

UNKNOWN = -1


class Slots:
    """Maps ids to slots in the tables of a loss, which share them: one look-up serves all tables.

    With ``num_samples`` an id is its slot. Without, ids are arbitrary int64 keys, kept in a dictionary, and the slots
    of n keys are numbers below the largest n there has been. O(batch) per step.
    """

    def __init__(self, num_samples: int | None) -> None:
        self._num_samples = num_samples
        self._keys: list[int] = []  # the dictionary's, by number
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    @property
    def fixed(self) -> bool:
        """Whether an id is its slot."""
        return self._num_samples is not None

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ids (count,) with replacement: from all ids if the size is known, else from those that have slots."""
        most = len(self._keys) if self._num_samples is None else self._num_samples
        if most == 0:
            return torch.full((count,), UNKNOWN, device="cpu")  # whatever the default device is
        drawn = torch.randint(most, (count,), generator=generator, device="cpu")
        return drawn if self.fixed else torch.tensor([self._keys[place] for place in drawn.tolist()], device="cpu")

    def find(self, ids: Tensor) -> Tensor:
        """Return the slots of ``ids`` (k,), `UNKNOWN` where a key has none."""
        if self.fixed:
            return ids
        return torch.tensor([*map(self._slots.get, ids.tolist(), repeat(UNKNOWN))], dtype=torch.int64).to(ids.device)

    def place(self, ids: Tensor) -> Tensor:
        """Return the slots of ``ids`` (k,), free ones for new keys; `keep` assigns these, once there is room."""
        if self.fixed:
            return ids
        new: dict[int, int] = {}
        slots = []
        for key in ids.tolist():
            slot = self._slots.get(key, new.get(key))
            if slot is None:
                count = len(new)
                slot = new[key] = self._free[~count] if count < len(self._free) else len(self._slots) + count
            slots.append(slot)
        return torch.tensor(slots, dtype=torch.int64).to(ids.device)

    def keep(self, ids: Tensor, slots: Tensor) -> None:
        """Assign to ``ids`` the ``slots`` that `place` has just found for them."""
        if self.fixed:
            return
        keys = ids.tolist()
        new = [key for key in dict.fromkeys(keys) if key not in self._slots]
        self._slots.update(zip(keys, slots.tolist(), strict=True))
        self._keys += new  # in the dictionary's order
        taken = min(len(new), len(self._free))
        del self._free[len(self._free) - taken :]

    def forget(self, ids: Tensor) -> Tensor:
        """Remove keys, all different, and return the slots that they had; unknown keys had none."""
        if self.fixed:
            return ids
        slots = [slot for key in ids.tolist() if (slot := self._slots.pop(key, None)) is not None]
        self._free += slots
        self._keys = [*self._slots]
        return torch.tensor(slots, dtype=torch.int64)

    def keys(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return all keys (n,) in the order in which they came, and their slots; None where ids are slots."""
        if self.fixed:
            return None, None
        return torch.tensor(self._keys, dtype=torch.int64), torch.tensor([*self._slots.values()], dtype=torch.int64)

    def check(self, keys: Tensor | None, *entries: Tensor) -> None:
        """Raise ValueError if saved keys (n,), or None, do not fit these slots or the saved entries (n, …)."""
        if (keys is None) != self.fixed:
            raise ValueError(
                f"the state was saved with num_samples{'=None' if self.fixed else ' given'}, "
                f"this loss has it {'given' if self.fixed else 'None'}: build the loss as the saved one was"
            )
        if self.fixed:
            return
        counts = {getattr(part, "shape", (None,))[:1] for part in (keys, *entries)}
        if (
            not isinstance(keys, Tensor)
            or keys.dtype != torch.int64
            or len(counts) != 1
            or torch.unique(keys).shape != keys.shape
        ):
            raise ValueError("the saved keys are not int64, all different, one an entry: the state is damaged")

    def load(self, keys: Tensor | None) -> None:
        """Load saved keys (n,): their slots are 0 … n-1."""
        if keys is not None:
            self._keys = keys.tolist()
            self._slots = {key: slot for slot, key in enumerate(self._keys)}
            self._free = []
