"""Kernels, which move chains: one per file, by name in `KERNELS`."""

from torch_emc2.kernels.base import EMPTY, Draws, Kernel, Move, Visit
from torch_emc2.kernels.isir import Isir
from torch_emc2.kernels.metropolis import Metropolis

__all__ = ["EMPTY", "KERNELS", "Draws", "Isir", "Kernel", "Metropolis", "Move", "Visit"]

KERNELS: dict[str, type[Kernel]] = {"metropolis": Metropolis, "isir": Isir}
