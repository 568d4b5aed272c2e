"""What a run tells while it goes on: what it is made of, where it stands, and what came of it."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, TextIO

import lightning as L
import torch
from torch import nn
from tqdm.auto import tqdm

from torch_emc2.config import Config
from torch_emc2.data import ImageDataset
from torch_emc2.training.step import ContrastiveModule

__all__ = ["Progress", "duration", "made_of", "room_of"]

_LOG = logging.getLogger(__name__)

_MEASURED = 20  # steps, after which a log has the time that the run will take
_SCALE = "0: all embeddings are equal; lower is better"


def made_of(config: Config, images: ImageDataset, module: ContrastiveModule, trainer: L.Trainer) -> list[str]:
    """Say in a few lines what a run trains, on what and where."""
    device, processes = trainer.strategy.root_device, trainer.world_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    many = f"{processes} processes on " if processes > 1 else ""
    threads = f", {torch.get_num_threads()} of its cores" if device.type == "cpu" else ""
    size, channels = config.data.augmentation.size, images.channels
    classes = f"{len(images.classes)} classes, not used in training" if images.classes else "no classes"
    encoder, steps = module.encoder, module.steps_per_epoch(processes)
    slow = "" if module.slow_encoder is None else f", and a momentum encoder alike, decay {module.decay(processes):.4g}"
    batch = config.batch_size * processes * config.accumulate
    return [
        f"Device: {many}{name}{threads}.",
        f"Images: {len(images)} to train on; {classes}; views of {size} x {size} x {channels}.",
        f"Model: {config.model.backbone}, {_millions(encoder.backbone)} weights, head {_millions(encoder.head)}{slow}.",
        f"Steps: {steps} of {batch} images an epoch, {config.epochs * steps} in all; loss {config.loss}.",
    ]


class Progress(L.Callback):
    """A bar over the whole run on a terminal, else a line an epoch; each with the time left and an epoch's mean loss.

    The loss shown is the estimate of the global loss, which all estimators have in common.

    Args:
        interactive: there is a terminal.
    """

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self.bar: Any = None  # of tqdm, on a terminal
        self.means: list[float] = []
        self.steps = -1  # until training starts

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count from the steps that a resumed run has already taken."""
        assert isinstance(module, ContrastiveModule)
        self.first = self.steps = trainer.global_step
        self.total = module.config.epochs * module.steps_per_epoch(trainer.world_size)
        self.begun, self.sum, self.batches = time.monotonic(), torch.zeros(()), 0
        self.shown = trainer.is_global_zero
        if self.first and self.shown:
            _LOG.info("Going on in epoch %d of %d.", trainer.current_epoch + 1, module.config.epochs)
        if self.interactive and self.shown:
            self.bar = tqdm(total=self.total, initial=self.first, unit="step", **room_of(sys.stderr))
            self._describe(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin another mean."""
        self.sum, self.batches = torch.zeros(()), 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        """Go on, if this batch completed a step."""
        assert isinstance(module, ContrastiveModule)
        self.sum = module.numbers["global_loss"] + self.sum.to(module.device)
        self.batches += 1
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        if self.bar is not None:
            self.bar.update(self.steps - self.bar.n)
        elif self.shown and self.steps - self.first == _MEASURED and self.left() > 60:
            _LOG.info("Time: about %s, as the first %d steps were.", duration(self.left()), _MEASURED)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Tell the epoch's mean."""
        self.means.append(float(self.sum) / max(1, self.batches))
        if self.bar is not None:
            self._describe(trainer)
        elif self.shown:
            done, epochs = trainer.current_epoch + 1, trainer.max_epochs
            left = f", {duration(self.left())} left" if done != epochs and self.left() > 60 else ""
            scale = f" ({_SCALE})" if len(self.means) == 1 else ""
            print(f"Epoch {done}/{epochs}: global loss {self.means[-1]:.4f}{scale}{left}", flush=True)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Tell what came of it."""
        assert isinstance(module, ContrastiveModule)
        self._close()
        if self.shown and module.skipped:
            _LOG.info("Images that could not be read were left out %d times; emc2 embed names them.", module.skipped)
        if self.shown and self.means:
            _LOG.info("Trained: %d steps in %s.", self.steps - self.first, duration(time.monotonic() - self.begun))
            of_first = "in the first since it went on" if self.first else "in the first"
            first, last = self.means[0], self.means[-1]
            _LOG.info("Global loss: %.3f in the last epoch, %.3f %s; lower is better.", last, first, of_first)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Say where there was nothing left to train."""
        if self.steps < 0 and trainer.is_global_zero:
            _LOG.info("All %d epochs had been trained.", trainer.max_epochs)

    def on_exception(self, *args: object) -> None:
        """Leave the line to what is printed next."""
        self._close()

    def left(self) -> float:
        """Return the seconds that the rest takes, at the rate so far."""
        return (time.monotonic() - self.begun) * (self.total - self.steps) / max(1, self.steps - self.first)

    def _describe(self, trainer: L.Trainer) -> None:
        epoch = min(self.steps * (trainer.max_epochs or 1) // self.total + 1, trainer.max_epochs or 1)
        self.bar.set_description(f"Epoch {epoch}/{trainer.max_epochs}")
        if self.means:
            self.bar.set_postfix_str(f"global loss {self.means[-1]:.3f}")

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def room_of(terminal: TextIO) -> dict[str, Any]:
    """Return a bar's room as tqdm takes it; some terminals in containers say 0, in which nothing would be seen."""
    try:
        known = os.get_terminal_size(terminal.fileno()).columns > 0
    except (OSError, ValueError):  # none
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}


def duration(seconds: float) -> str:
    """Write a time by its two largest units."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def _millions(module: nn.Module) -> str:
    return f"{sum(weights.numel() for weights in module.parameters()) / 1e6:.2f} M"
