"""The temperature: what similarities are divided by."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import Tensor

__all__ = ["require_temperature"]

_COLDEST = 1e-30  # colder, float32 overflows


def require_temperature(value: Any) -> float:
    """Return a temperature that must be a positive number, of Python's or NumPy's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        got = f"a {type(value).__name__}: it cannot be learnt yet" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"temperature must be a number, such as 0.07, got {got}")
    try:
        temperature = float(value)
    except OverflowError:  # an int or fraction beyond floating point
        temperature = math.inf
    if not _COLDEST <= temperature < math.inf:
        raise ValueError(f"temperature must be a positive number (at least {_COLDEST:g}), got {value!r}")
    return temperature
