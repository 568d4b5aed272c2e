"""The gradient of the global contrastive loss at the price of an in-batch one."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from torch_emc2 import exact
    from torch_emc2.chunked import cached_backward
    from torch_emc2.indexed import IndexedDataset
    from torch_emc2.kernels import metropolis
    from torch_emc2.losses import (
        ContrastiveLoss,
        DCLLoss,
        EMC2Loss,
        InfoNCELoss,
        MomentumLoss,
        NegativeCacheLoss,
        SogCLRLoss,
        UniformityLoss,
        ema_decay,
    )
    from torch_emc2.runs.model import Model
    from torch_emc2.temperature import Temperature

__version__ = "0.2.0"

__all__ = [
    "ContrastiveLoss",
    "DCLLoss",
    "EMC2Loss",
    "IndexedDataset",
    "InfoNCELoss",
    "MomentumLoss",
    "NegativeCacheLoss",
    "SogCLRLoss",
    "Temperature",
    "UniformityLoss",
    "cached_backward",
    "ema_decay",
    "exact",
    "load",
    "metropolis",
]

_HOMES = {
    "IndexedDataset": "indexed",
    "Temperature": "temperature",
    "cached_backward": "chunked",
    "exact": "exact",
    "metropolis": "kernels",
}


def load(
    run: str | os.PathLike[str], *, device: torch.device | str | None = None, value_range: str | None = None
) -> Model:
    """Load a finished run's encoder, to embed images with: ``torch_emc2.load("runs/photos").embed("a.jpg")``.

    Needs what ``torch-emc2[train]`` installs. `torch_emc2.runs.Model` says what the arguments are.
    """
    from torch_emc2.runs import Model

    return Model(run, device=device, value_range=value_range)


if not TYPE_CHECKING:  # to whom any name would be one of these

    def __getattr__(name: str) -> Any:
        """Import what is asked for, and torch with it, which the command does without until its arguments are right."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = import_module(f"{__name__}.{_HOMES.get(name, 'losses')}")
        globals()[name] = value = home if name == "exact" else getattr(home, name)
        return value

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
