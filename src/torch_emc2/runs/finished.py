"""A run that has come to its end: its config, its encoder, and where that computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from torch_emc2.config import Config, recorded_config
from torch_emc2.data import BadImageError
from torch_emc2.models import Encoder, load_encoder
from torch_emc2.run_folder import require_finished

__all__ = ["FinishedRun", "leave_out_advised", "load_run"]


class FinishedRun(NamedTuple):
    """What a run's folder has; the encoder is on the device, in evaluation mode."""

    config: Config
    encoder: Encoder
    device: torch.device


def load_run(run: Path, device: torch.device | str | None = None) -> FinishedRun:
    """Load a run's encoder; by default to a GPU, where there is one and the run's accelerator allows it.

    Raises:
        ValueError: the folder is no finished run, or its files are damaged.
    """
    require_finished(run)
    config = recorded_config(run)
    cuda = torch.cuda.is_available() and config.accelerator != "cpu"
    device = torch.device(device or ("cuda" if cuda else "cpu"))
    return FinishedRun(config, load_encoder(run).to(device), device)


@contextmanager
def leave_out_advised(run: Path) -> Iterator[None]:
    """Say of an image that turns out to be unreadable how it is left out."""
    try:
        yield
    except BadImageError as error:
        setting = f"data.on_bad_image: skip in {run / 'config.yaml'}"
        raise BadImageError(f"{error}: mend or remove it, or leave it out by {setting}") from error
