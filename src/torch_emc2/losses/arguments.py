"""Validation of the arguments of losses, and the values they take for a batch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_emc2.rows import Rows
from torch_emc2.settings.losses import PositiveWeight
from torch_emc2.validation import Towers

__all__ = [
    "NumSamples",
    "log_positive_weight",
    "require_int",
    "require_sizes",
]

NumSamples = int | tuple[int | None, int | None] | None
"""Size of the data set; None if ids may be any int64 except -1. With two towers, one size for both sides or a pair."""


def require_int(name: str, value: Any) -> int:
    """Return a setting as an int. It must be a whole number, of Python's or NumPy's types."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


def require_sizes(num_samples: Any, towers: Towers) -> tuple[int | None, ...]:
    """Return the size of each side, None where it is not known, from ``num_samples``: one size or a pair."""
    given = num_samples if isinstance(num_samples, tuple) else (num_samples,) * towers
    if len(given) != towers:
        raise ValueError(f"num_samples must be one size, or with towers=2 a pair of them; got {num_samples!r}")
    sizes = tuple(None if size is None else require_int("num_samples", size) for size in given)
    for size in sizes:
        if size is not None and size < 2:
            raise ValueError(f"num_samples must be at least 2 (or None, for any ids), the size of the data; got {size}")
    return sizes


def log_positive_weight(value: PositiveWeight, rows: Rows, sizes: Sequence[int | None]) -> float | Tensor:
    """Return log κ: a number, or (rows,) where rows differ in their number of negatives."""
    if value != "global":
        return math.log(value) if value > 0 else -math.inf
    size = sizes[rows.contrast.candidates]
    assert size is not None
    return rows.log_num_negatives - math.log(rows.contrast.negatives_in_data(size))
