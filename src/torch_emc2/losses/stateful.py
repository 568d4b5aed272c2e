"""What the estimators share that remember something of every sample: their memory saved, loaded, and forgotten."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_emc2.losses.base import ContrastiveLoss, require_int
from torch_emc2.pairs import unique_ids
from torch_emc2.ranks import several_ranks
from torch_emc2.seeds import mix_seed

__all__ = ["StatefulLoss"]


class StatefulLoss(ContrastiveLoss):
    """A loss that remembers something of every sample: needs ``index``, and puts its memory in ``state_dict()``.

    `forget` takes samples out of it.

    In evaluation mode (``loss_fn.eval()``) the memory is read and not written.
    """

    _needs_index = True

    def __init__(self, num_samples: int | None, temperature: float) -> None:
        super().__init__(temperature)
        if num_samples is not None:
            num_samples = require_int("num_samples", num_samples)
            if num_samples < 2:
                raise ValueError(
                    f"num_samples must be at least 2 (or None, for any ids), the size of the data; got {num_samples}"
                )
        self.num_samples = num_samples
        self._calls = 0
        self._mark = 0  # left by loads and removals: a step changes the memory of all ranks alike, these may not

    def _alike(self) -> dict[str, object]:
        return {
            **super()._alike(),
            "num_samples": self.num_samples,
            "number of the call": self._calls,
            "checksum of what was loaded and forgotten": self._mark,
        }

    def forget(self, ids: Tensor) -> None:
        """Forget samples that are removed from the data: all that is remembered of them, also as others' negatives.

        Takes a look at every entry, O(num_samples): for rare use. With several ranks call it on all, with the same ids.
        A forgotten sample that comes again is new.

        Args:
            ids: (k,) ids as the loss is called with, of all views where it is called with those; never seen ones will
                do.

        Raises:
            IndexError, TypeError: an id is not below num_samples, or no integer; nothing has changed.
        """
        gone = unique_ids(ids, self.num_samples)
        self._forget(gone)
        if several_ranks():
            self._mark = mix_seed(self._mark, _checksum(gone))

    @abstractmethod
    def _forget(self, ids: Tensor) -> None:
        """Forget ``ids`` (k,), valid and all different."""

    @abstractmethod
    def get_extra_state(self) -> dict[str, Any]:
        """Return the memory, for ``state_dict()``; DDP does not broadcast it and ``.half()`` does not touch it."""

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return ``state_dict()`` with every table split among the ranks, as `torch.distributed.checkpoint` saves it.

        To be called on all ranks, which then write a part each. ``dcp.load(state_dict, …)`` puts the parts together
        again, in a world of any size.
        """
        from torch.distributed.device_mesh import init_device_mesh  # a second of imports
        from torch.distributed.tensor import Shard, distribute_tensor

        def split(table: Tensor) -> Tensor:
            ranks = init_device_mesh(table.device.type, (dist.get_world_size(),))
            return distribute_tensor(table, ranks, [Shard(0)], src_data_rank=None)  # what the ranks have is the same

        sharded: dict[str, Any] = tree_map_only(Tensor, split, self.state_dict())
        return sharded

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a saved memory: the next call does what would have come next.

        Raises:
            ValueError: it is another loss's, or of another size; nothing has changed.
        """
        _check_alike(state, self.get_extra_state(), type(self).__name__)
        self._load(state)
        self._mark = _checksum(self.get_extra_state()) if several_ranks() else 0

    @abstractmethod
    def _load(self, state: dict[str, Any]) -> None:
        """Take over a memory of the right names: check it all, then change."""

    def extra_repr(self) -> str:
        """Show size and temperature."""
        return f"num_samples={self.num_samples}, {super().extra_repr()}"


def _check_alike(saved: Any, own: Any, name: str) -> None:
    """Raise ValueError where a state has other names in it than a loss's own, or no number where that has one."""
    if isinstance(own, dict):
        if not isinstance(saved, dict) or set(saved) != set(own):
            found = sorted(map(str, saved)) if isinstance(saved, dict) else repr(saved)
            raise ValueError(f"the saved state has {found}, this {name} {sorted(own)}: load what such a loss has saved")
        for key in own:
            _check_alike(saved[key], own[key], name)
    elif isinstance(own, int | float) and type(saved) is not type(own):
        raise ValueError(f"the saved state has {saved!r} for a number: load what a {name} has saved")


def _checksum(state: Any) -> int:
    """Mix the sums of all tensors of a state, as whole numbers of the same bits, which wrap: O(its size), fast."""
    kinds = {4: torch.int32, 8: torch.int64}
    tables = [leaf.view(kinds[leaf.itemsize]) for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    return mix_seed(*(int(table.sum(dtype=table.dtype)) for table in tables))
