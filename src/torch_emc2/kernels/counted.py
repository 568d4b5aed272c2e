"""Draws as a function of counters, so that a compiled loop can make them where it uses them."""

from __future__ import annotations

import logging
import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torch_emc2.ranks import Ranks
from torch_emc2.seeds import mix_seed

__all__ = ["CountedDraws", "compiled_kernels"]

_LOG = logging.getLogger(__name__)


@cache
def compiled_kernels(device: str) -> ModuleType | None:
    """Import the moves compiled for a kind of device when they are first needed; None where there are none.

    On the CPU they need numba, which is optional; on a GPU Triton, which comes with torch, and a C compiler.
    """
    try:
        if device == "cpu":
            from torch_emc2.kernels import _numba

            _tell_of_compiling(_numba.__name__)
            return _numba
        if device == "cuda" and torch.cuda.is_available():
            from torch_emc2.kernels import _triton

            return _triton if _compiles(_triton) else None
    except ImportError:
        pass
    return None


def _compiles(kernels: ModuleType) -> bool:
    """Tell whether Triton can: it is there with torch also where it cannot."""
    try:
        kernels.draw(kernels.counters(0, 0, 1, 0, 1), torch.empty(1, 1, device="cuda"))
    except Exception as error:
        _LOG.warning("Chains move by operations on tensors, which is slower: Triton cannot compile here (%s)", error)
        return False
    return True


def _tell_of_compiling(module: str) -> None:
    """Say so where numba compiles something of a module, not where it has it from before."""
    from numba.core import event

    class Compiling(event.Listener):
        def on_start(self, event: Any) -> None:
            if event.data["dispatcher"].py_func.__module__ == module:
                _tell_once()

        def on_end(self, event: Any) -> None: ...

    event.register("numba:compile", Compiling())  # type: ignore[no-untyped-call]


@cache
def _tell_once() -> None:
    _LOG.info("Compiling the chains' moves for this processor: some seconds, once where numba can keep them")


class CountedDraws:
    """Draws of some rows of a batch; see `Draws`.

    Args:
        kernels: the compiled moves, which draw for themselves.
        key: 64 bits, of the call.
        first: number of the first row, among this rank's.
        rows: how many.
        ranks: how the batch is spread.
        dtype: of what is drawn.
    """

    def __init__(self, kernels: ModuleType, key: int, first: int, rows: int, ranks: Ranks, dtype: torch.dtype) -> None:
        self.kernels = kernels
        self._key, self._place = key, (first, ranks.local, ranks.start, ranks.size)
        self._rows, self._dtype, self._device = rows, dtype, ranks.device
        self._times = 0

    def counters(self) -> Any:
        """What a compiled move makes the next draws from, in the place of `exponential`."""
        self._times += 1
        return self.kernels.counters(mix_seed(self._key, self._times), *self._place)

    def exponential(self, *shape: int) -> Tensor:
        """Draw Exp(1) numbers (rows, \\*shape)."""
        drawn = torch.empty(self._rows, math.prod(shape), device=self._device)
        self.kernels.draw(self.counters(), drawn)
        return drawn.to(self._dtype).view(self._rows, *shape)
