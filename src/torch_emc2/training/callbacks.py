"""What goes along with a training run: its metrics files, whole checkpoints, and how it stops."""

from __future__ import annotations

import csv
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from torch_emc2.files import whole_file
from torch_emc2.run_folder import resume_command

__all__ = ["KeptCheckpoints", "MetricsFile", "StopOnSIGTERM", "TensorBoardFile", "WholeCheckpoints"]


class MetricsFile(L.Callback):
    """metrics.csv of a run, a row each ``trainer.log_every_n_steps``; a resumed run goes on in the same file.

    A callback, since Lightning's loggers are served after the step's checkpoint: a process killed between the two would
    resume without the row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        self.torn = False  # a last line that is not whole, which a machine that lost its power may leave

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Read the rows of a run that goes on."""
        if self.path.exists():
            text = self.path.read_text()
            whole = text[: text.rfind("\n") + 1]
            self.rows = [row for row in csv.DictReader(whole.splitlines()) if _is_whole(row)]
            self.torn = len(self.rows) + bool(text) != text.count("\n") or whole != text

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Count from the steps that a resumed run has already taken."""
        self.steps = trainer.global_step

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Write a row if this batch completed a step whose turn it is."""
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            if self.steps % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
                self.write(numbers | {"epoch": trainer.current_epoch}, self.steps - 1)

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a row; a column that is new, or steps that are run again after an interruption, rewrite the file."""
        known = list(self.rows[0]) if self.rows else []
        row = dict.fromkeys(known, "") | {"step": str(step)} | {name: f"{value:.8g}" for name, value in metrics.items()}
        again = bool(self.rows) and int(self.rows[-1]["step"]) >= step
        if again:
            self.rows = [old for old in self.rows if int(old["step"]) < step]
        self.rows.append(row)
        if again or self.torn or list(row) != known:
            self.torn = False
            self.rows = [dict.fromkeys(row, "") | old for old in self.rows]
            with whole_file(self.path) as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
                writer.writerows(self.rows)
        else:
            size = self.path.stat().st_size
            try:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, known).writerow(row)
            except OSError as error:
                os.truncate(self.path, size)  # half a row is none
                raise OSError(f"{self.path}: row {step} was not written: {error.strerror or error}") from error


def _is_whole(row: Mapping[str | None, Any]) -> bool:
    return str(row.get("step")).isdigit() and None not in row and None not in row.values()


class TensorBoardFile(TensorBoardLogger):
    """Lightning's, but that it tells what stops a run while it writes, where that says: a value is not supported."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write them.

        Raises:
            OSError: they cannot be written.
            RuntimeError: a loader's worker was killed meanwhile.
        """
        try:
            super().log_metrics(metrics, step)
        except ValueError as error:
            if (stopped := error.__cause__) is None:
                raise
            raise stopped from stopped.__cause__


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


class StopOnSIGTERM(L.Callback):
    """What ends a run early, on all ranks; a callback, and a context for the whole run.

    After SIGTERM the step at hand is finished and saved, and a line says how to go on; before training has begun there
    is nothing to finish, and several ranks leave to the system to end them (`meet`). Lightning's own handler would save
    nothing, and broadcasts in the middle of whatever the ranks are exchanging.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.last = run, run / "checkpoints" / "last.ckpt"
        self.handles = threading.current_thread() is threading.main_thread()  # others may not
        self.asked = False

    def __enter__(self) -> None:
        if self.handles:
            self.before = signal.signal(signal.SIGTERM, self._stop_at_once)

    def __exit__(self, kind: type[BaseException] | None, *args: Any) -> None:
        if self.handles:
            signal.signal(signal.SIGTERM, self.before)
        if kind is SIGTERMException:
            begun = (self.run / "config.yaml").exists()
            how = f"{resume_command(self.run)} goes on" if begun else "the run had not begun"
            rank_zero_only(print)(f"emc2: stopped by SIGTERM; {how}", file=sys.stderr)

    def meet(self) -> None:
        """Be ready for ranks to meet: they wait for one another, without end, in code that runs no handler."""
        if self.handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _stop_at_once(self, *args: Any) -> None:
        raise SIGTERMException

    def _stop_after_step(self, *args: Any) -> None:
        self.asked = True

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Take the place of Lightning's handler, which puts back the one before both."""
        self.steps, self.asked = trainer.global_step, trainer.received_sigterm
        if self.handles:
            signal.signal(signal.SIGTERM, self._stop_after_step)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Stop if this batch completed a step and any rank was asked to."""
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
                trainer.save_checkpoint(self.last)
                raise SIGTERMException

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the other ranks where this one, which alone writes files, cannot: they would wait for it."""
        if isinstance(exception, OSError) and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
