"""The temperature that similarities are divided by: a number, or learnt."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Temperature", "require_temperature"]

_COLDEST = 1e-30  # below this, float32 overflows


class Temperature(nn.Module):
    """A temperature that is learnt, by CLIP's convention (Radford et al. 2021): ``logit_scale`` is log β, clamped.

    Pass it to a loss as its ``temperature``; it is then among the loss's parameters, for the optimiser.

    On several ranks each has the gradient of its own rows only: let DDP wrap the loss together with the encoder, or
    average this parameter's gradient as you average the encoder's.

    Args:
        value: initial temperature.
        min: lowest temperature; CLIP's is 0.01.

    Example::

        >>> loss_fn = torch_emc2.InfoNCELoss(Temperature(0.07))
        >>> [name for name, _ in loss_fn.named_parameters()]
        ['temperature.logit_scale']
    """

    def __init__(self, value: float = 0.07, *, min: float = 0.01) -> None:
        super().__init__()
        value, self.min = require_temperature(value), require_temperature(min)
        if value < self.min:
            raise ValueError(f"the temperature must not be below min={min:g}, got {value:g}")
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(value)))

    def forward(self) -> Tensor:
        """Return β, a scalar with gradient; a parameter that is beyond the limit is first set back to it."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=-math.log(self.min))
        return self.logit_scale.exp()

    def extra_repr(self) -> str:
        """Show the limit."""
        return f"min={self.min:g}"


def require_temperature(value: Any) -> float:
    """Return a temperature as a float. It must be a positive number, of Python's or NumPy's types."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        learnt = isinstance(value, Tensor)
        got = f"a {type(value).__name__}: to learn it give Temperature(0.07)" if learnt else repr(value)
        raise TypeError(f"temperature must be a number, such as 0.07, got {got}")
    try:
        temperature = float(value)
    except OverflowError:  # an int or fraction beyond floating point
        temperature = math.inf
    if not _COLDEST <= temperature < math.inf:
        raise ValueError(f"temperature must be a positive number (at least {_COLDEST:g}), got {value!r}")
    if temperature > 1:
        warnings.warn(
            f"temperature is 1 / scale: {temperature:g} tells nothing apart, {1 / temperature:g} may be meant",
            stacklevel=_callers_level(),
        )
    return temperature


def _callers_level() -> int:
    """Return the ``stacklevel`` at which a warning of the calling function names the first line outside the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch_emc2"):
        level, frame = level + 1, frame.f_back
    return level
