"""What can be set of the losses, an estimator a row; `torch_emc2.losses.registry` builds them from it."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "LOSSES",
    "Carry",
    "EMC2Config",
    "MomentumConfig",
    "NegativeCacheConfig",
    "PositiveWeight",
    "SogCLRConfig",
    "UniformityConfig",
    "group_of",
    "is_outside",
    "require_loss",
    "require_positive_weight",
]

Carry = Literal["encode", "encode_if_used", "cache", "defer", "drop"]

PositiveWeight = float | Literal["global"]
"""κ ≥ 0, the positive's mass beside the batch's negatives; ``"global"`` is n / N, n negatives of N."""


@dataclass
class EMC2Config:
    """EMC²'s own settings, as `torch_emc2.EMC2Loss` takes them; here carried images are encoded by default.

    Attributes:
        burn_in: of the kernel metropolis, the share of a walk's steps that are not counted; null for one half.
        num_chains: chains a sample.
        carry: who supplies the carried negative's embedding.
        kernel: how a chain moves; metropolis is the paper's.
        num_remembered: further proposals, drawn uniformly from the data by their last embeddings.
    """

    burn_in: float | None = None
    num_chains: int = 1
    carry: Carry = "encode"
    kernel: Literal["isir", "metropolis"] = "isir"
    num_remembered: int = 0

    def __post_init__(self) -> None:
        if self.burn_in is not None and not 0 <= self.burn_in < 1:
            raise ValueError(f"burn_in must be at least 0 and below 1, got {self.burn_in}")
        if self.burn_in is not None and self.kernel == "isir":
            raise ValueError(
                f"burn_in must be null for the kernel isir (kernel metropolis has one), got {self.burn_in}"
            )
        if self.num_chains < 1:
            raise ValueError(f"num_chains must be at least 1, got {self.num_chains}")
        if self.num_remembered < 0:
            raise ValueError(f"num_remembered must be at least 0, got {self.num_remembered}")


@dataclass
class SogCLRConfig:
    """SogCLR's own settings.

    Attributes:
        gamma: weight of the present batch in the moving average.
    """

    gamma: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma}")


@dataclass
class UniformityConfig:
    """`torch_emc2.UniformityLoss`'s own settings.

    Attributes:
        gamma: weight of the present batch in the moving average that all rows share.
    """

    gamma: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma}")


@dataclass
class MomentumConfig:
    """`torch_emc2.MomentumLoss`'s own settings, and its encoder's.

    Attributes:
        decay: of the momentum encoder, which keeps this share of itself in every step of the optimiser; null for
            `torch_emc2.ema_decay` the samples of a step.
        queue_size: its last embeddings that are kept as negatives.
    """

    decay: float | None = None
    queue_size: int = 512

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"decay must be above 0 and below 1, got {self.decay}")
        if self.queue_size < 0:
            raise ValueError(f"queue_size must be at least 0, got {self.queue_size}")


@dataclass
class NegativeCacheConfig:
    """Negative Cache's own settings.

    Attributes:
        refresh_fraction: share of the cache that is encoded anew each step.
    """

    refresh_fraction: float = 0.01024

    def __post_init__(self) -> None:
        if not 0 <= self.refresh_fraction <= 1:
            raise ValueError(f"refresh_fraction must be from 0 to 1, got {self.refresh_fraction}")


LOSSES: Mapping[str, type[Any] | None] = {
    "infonce": None,
    "dcl": None,
    "momentum": MomentumConfig,
    "uniformity": UniformityConfig,
    "sogclr": SogCLRConfig,
    "negative-cache": NegativeCacheConfig,
    "emc2": EMC2Config,
}
"""The settings of each estimator, by the name that ``--loss`` takes; None where there are none."""


def group_of(name: str) -> str:
    """Return what an estimator's settings are called in a config."""
    return name.replace("-", "_")


def is_outside(name: str) -> bool:
    """Tell whether a loss's name is that of a class; nothing is imported."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name) is not None


def require_loss(name: str) -> None:
    """Raise ValueError for what can be no loss's name; nothing is imported."""
    if name not in LOSSES and not is_outside(name):
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)}, or a class of your own as package.module:Class, got {name!r}"
        )


def require_positive_weight(value: Any, sizes: Sequence[int | None]) -> PositiveWeight:
    """Return a weight of the positive that is a number, or ``"global"`` where the sizes of the data are known."""
    if value == "global":
        if None in sizes:
            raise ValueError('positive_weight="global" is n / N: give num_samples, the size of the data')
        return "global"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f'positive_weight must be a number or "global", got {value!r}')
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"positive_weight must be at least 0 and finite, got {value!r}")
    return float(value)
