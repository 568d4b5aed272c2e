"""A run's checkpoints: when they are made; each whole, or not there."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from torch_emc2.config import Config
from torch_emc2.files import whole_file

__all__ = ["KeptCheckpoints", "WholeCheckpoints", "checkpoint_callbacks"]


def checkpoint_callbacks(config: Config, folder: Path) -> list[ModelCheckpoint]:
    """Return what renews last.ckpt at the end of each epoch, and the config's own checkpoints."""
    renew = partial(ModelCheckpoint, folder, "last", enable_version_counter=False)
    keep = partial(KeptCheckpoints, folder, "epoch-{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    callbacks: list[ModelCheckpoint] = [renew(every_n_epochs=1, save_on_train_epoch_end=True)]
    if config.checkpoint_every_steps is not None:
        callbacks.append(renew(every_n_train_steps=config.checkpoint_every_steps))
    if config.checkpoint_every_epochs is not None:
        callbacks.append(keep(every_n_epochs=config.checkpoint_every_epochs, save_on_train_epoch_end=True))
    return callbacks


class KeptCheckpoints(ModelCheckpoint):
    """Checkpoints beside the last one.

    Lightning tells callbacks apart by class and settings, and one that keeps every epoch's has those of the last one's.
    """


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that take their name when they are whole.

    Lightning writes them to the system's folder for temporary files and moves them from there. To another file system
    that is a copy: a process killed in the middle of it would leave half a checkpoint in the place of the last good
    one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        with whole_file(Path(path)) as file, file.open("wb") as stream:
            try:
                torch.save(checkpoint, stream)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch's words for a full disk say nothing of it
                    raise error.__context__ from error
                raise
