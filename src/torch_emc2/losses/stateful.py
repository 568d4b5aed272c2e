"""Base classes of losses that remember something between calls: their memory is saved, loaded and forgotten here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_emc2.batch import Directions
from torch_emc2.losses.arguments import NumSamples
from torch_emc2.losses.base import ContrastiveLoss
from torch_emc2.ranks import several_ranks
from torch_emc2.seeds import mix_seed
from torch_emc2.settings.losses import PositiveWeight
from torch_emc2.temperature import Temperature
from torch_emc2.validation import Towers, unique_ids

__all__ = ["Memory", "PerSampleLoss", "SampleMemory", "StatefulLoss"]


class Memory(ABC):
    """What a loss remembers of one side."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return everything to save."""

    @abstractmethod
    def check(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a saved `state`, whose names are right, does not fit; change nothing."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Load a saved `state` that fits."""


class SampleMemory(Memory):
    """What a loss remembers of the samples of one side."""

    @abstractmethod
    def forget(self, ids: Tensor) -> None:
        """Forget samples ``ids`` (k,) of this side, all different."""

    def forget_negatives(self, ids: Tensor) -> None:
        """Forget samples ``ids`` (k,) of the other side (or the same, with one tower) where they are negatives."""


class StatefulLoss(ContrastiveLoss):
    """A loss that remembers something between calls, and saves this memory in ``state_dict()``.

    In evaluation mode (``loss_fn.eval()``) the memory is read but not written.

    Attributes:
        sides: the memory of each side: one, or with ``towers=2`` x's and y's.
    """

    sides: Sequence[Memory]
    remembers_positive = False
    """Whether the memory includes the positive with its weight κ, and so is valid for one κ only."""

    def __init__(
        self,
        temperature: float | Temperature,
        num_samples: NumSamples,
        *,
        positive_weight: PositiveWeight,
        towers: Towers,
        directions: Directions,
    ) -> None:
        super().__init__(
            temperature, num_samples, positive_weight=positive_weight, towers=towers, directions=directions
        )
        self._calls = 0
        self._mark = 0  # a checksum of loads and removals, which unlike steps may differ between ranks

    def _alike(self, device: str) -> dict[str, object]:
        return {
            **super()._alike(device),
            "num_samples": self.num_samples,
            "number of the call": self._calls,
            "checksum of what was loaded and forgotten": self._mark,
        }

    def _remember(self, writes: list[Callable[[], None]]) -> None:
        super()._remember(writes)
        self._calls += 1

    def _position(self) -> dict[str, Any]:
        """Return the numbers that the next call depends on, in addition to the memory."""
        return {"calls": self._calls, **({"positive_weight": self._kappa} if self.remembers_positive else {})}

    @property
    def _kappa(self) -> float:
        """κ as a number; for "global", n / N, minus the size of the data, of both sides together."""
        if self.positive_weight == "global":
            return -float(sum(size or 0 for size in self.sizes))
        return float(self.positive_weight)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the memory, for ``state_dict()``; DDP does not broadcast it and ``.half()`` does not touch it."""
        x, *y = (side.state() for side in self.sides)
        return {**(x if not y else {"x": x, "y": y[0]}), **self._position()}

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return ``state_dict()`` with every table split among the ranks, as `torch.distributed.checkpoint` saves it.

        Call it on all ranks; each then writes a part. ``dcp.load(state_dict, …)`` puts the parts together again, on any
        number of ranks.
        """
        from torch.distributed.device_mesh import init_device_mesh  # a second of imports
        from torch.distributed.tensor import Shard, distribute_tensor

        def split(table: Tensor) -> Tensor:
            ranks = init_device_mesh(table.device.type, (dist.get_world_size(),))
            if table.ndim == 0:  # a parameter
                return table
            return distribute_tensor(table, ranks, [Shard(0)], src_data_rank=None)  # all ranks hold the same

        sharded: dict[str, Any] = tree_map_only(Tensor, split, self.state_dict())
        return sharded

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load a saved memory: the next call does what the call after the save would have done.

        Raises:
            ValueError: the memory is of another loss, or of another size; nothing has changed.
        """
        _check_alike(state, self.get_extra_state(), type(self).__name__)
        saved = (state,) if self.towers == 1 else (state["x"], state["y"])
        for side, memory in zip(self.sides, saved, strict=True):
            side.check(memory)
        self._check_sides(saved)
        self._take_position(state)
        for side, memory in zip(self.sides, saved, strict=True):
            side.load(memory)
        self._mark = _checksum(self.get_extra_state()) if several_ranks() else 0

    def _check_sides(self, saved: Sequence[dict[str, Any]]) -> None:
        """Raise ValueError if sides that each fit do not fit together."""

    def _take_position(self, state: dict[str, Any]) -> None:
        """Load the numbers of `_position`, or raise ValueError."""
        if state["calls"] < 0:
            raise ValueError(f"the saved state is damaged: it is of {state['calls']} calls")
        saved = state["positive_weight"] if self.remembers_positive and state["calls"] else self._kappa
        if saved != self._kappa:
            told, own = (
                f"'global' of {-kappa:g} samples" if kappa < 0 else f"{kappa:g}" for kappa in (saved, self._kappa)
            )
            raise ValueError(
                f"the saved averages are of positive_weight={told}, this loss has {own}: build it with what they were "
                "saved with"
            )
        self._calls = state["calls"]

    def extra_repr(self) -> str:
        """Show size and settings."""
        return f"num_samples={self.num_samples}, {super().extra_repr()}"


class PerSampleLoss(StatefulLoss):
    """A loss that remembers something of each sample, by its ``index``. `forget` removes samples from the memory."""

    needs_index = True
    sides: Sequence[SampleMemory]

    def forget(self, ids: Tensor, y_ids: Tensor | None = None) -> None:
        """Forget samples that are removed from the data: all that is remembered of them, also as others' negatives.

        This reads every entry, O(num_samples), so call it rarely. With several ranks call it on all of them, with the
        same ids. A forgotten sample that comes again is new.

        Args:
            ids: (k,) ids as the loss is called with, of all views if views have their own ids. Ids that were never seen
                are allowed. With two towers, x's.
            y_ids: (k,) with two towers, y's.

        Raises:
            IndexError, TypeError: an id is not below num_samples, or not an integer; nothing has changed.
        """
        given = (ids,) if y_ids is None else (ids, y_ids)
        if len(given) > self.towers:
            raise ValueError("y_ids are for towers=2")
        gone = [unique_ids(each, size) for each, size in zip(given, self.sizes, strict=False)]
        for side, each in enumerate(gone):
            self.sides[side].forget(each)
            self.sides[side + 1 - self.towers].forget_negatives(each)
        if several_ranks():
            self._mark = mix_seed(self._mark, _checksum(gone))


def _check_alike(saved: Any, own: Any, name: str) -> None:
    """Raise ValueError if a saved state has other names than the loss's own, or no number where that has one."""
    if isinstance(own, dict):
        if not isinstance(saved, dict) or set(saved) != set(own):
            found = sorted(map(str, saved)) if isinstance(saved, dict) else repr(saved)
            raise ValueError(f"the saved state has {found}, this {name} {sorted(own)}: load what such a loss has saved")
        for key in own:
            _check_alike(saved[key], own[key], name)
    elif isinstance(own, int | float) and type(saved) is not type(own):
        raise ValueError(f"the saved state has {saved!r} for a number: load what a {name} has saved")


def _checksum(state: Any) -> int:
    """Return a checksum of a state: its tensors' bits are summed as integers, with overflow; O(its size), fast."""
    kinds = {4: torch.int32, 8: torch.int64}
    tables = [leaf.view(kinds[leaf.itemsize]) for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    return mix_seed(*(int(table.sum(dtype=table.dtype)) for table in tables))
