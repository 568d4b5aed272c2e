"""Settings of losses: validated, and what they come to in a batch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from torch_emc2.rows import Rows
from torch_emc2.validation import Towers

__all__ = [
    "NumSamples",
    "PositiveWeight",
    "log_positive_weight",
    "require_int",
    "require_positive_weight",
    "require_sizes",
]

NumSamples = int | tuple[int | None, int | None] | None
"""Size of the data; None where ids are any int64 but -1. With two towers of both sides, or a pair."""

PositiveWeight = float | Literal["global"]
"""κ ≥ 0, the positive's mass beside the batch's negatives; ``"global"`` is n / N, n negatives of N."""


def require_int(name: str, value: Any) -> int:
    """Return a setting that must be a whole number, of Python's or NumPy's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


def require_sizes(num_samples: Any, towers: Towers) -> tuple[int | None, ...]:
    """Return the size of each side, or None where it is open; of ``num_samples``, or of a pair of them."""
    given = num_samples if isinstance(num_samples, tuple) else (num_samples,) * towers
    if len(given) != towers:
        raise ValueError(f"num_samples must be one size, or with towers=2 a pair of them; got {num_samples!r}")
    sizes = tuple(None if size is None else require_int("num_samples", size) for size in given)
    for size in sizes:
        if size is not None and size < 2:
            raise ValueError(f"num_samples must be at least 2 (or None, for any ids), the size of the data; got {size}")
    return sizes


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


def log_positive_weight(value: PositiveWeight, rows: Rows, sizes: Sequence[int | None]) -> float | Tensor:
    """Return log κ: a number, or (rows,) where rows differ in how many negatives they have."""
    if value != "global":
        return math.log(value) if value > 0 else -math.inf
    size = sizes[rows.contrast.candidates]
    assert size is not None
    return rows.log_num_negatives - math.log(rows.contrast.negatives_in_data(size))
