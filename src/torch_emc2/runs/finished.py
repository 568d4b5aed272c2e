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
from torch_emc2.training.run_folder import is_finished, resume_command

__all__ = ["FinishedRun", "leave_out_advised", "load_run"]


class FinishedRun(NamedTuple):
    """What a run's folder has; the encoder is on the device."""

    config: Config
    encoder: Encoder
    device: torch.device


def load_run(run: Path) -> FinishedRun:
    """Load a run's encoder.

    Raises:
        ValueError: the folder is no finished run, or its files are damaged.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{str(run)!r} is not a run's folder: it has no config.yaml")
    if not is_finished(run):
        raise ValueError(f"the run in {str(run)!r} is not finished: {resume_command(run)} goes on")
    config = recorded_config(run)
    cuda = torch.cuda.is_available() and config.accelerator != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    return FinishedRun(config, load_encoder(run).to(device), device)


@contextmanager
def leave_out_advised(run: Path) -> Iterator[None]:
    """Say of an image that turns out to be unreadable how it is left out."""
    try:
        yield
    except BadImageError as error:
        setting = f"data.on_bad_image: skip in {run / 'config.yaml'}"
        raise BadImageError(f"{error}: mend or remove it, or leave it out by {setting}") from error
