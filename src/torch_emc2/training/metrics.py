"""The numbers of a run: metrics.csv, and TensorBoard's log."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from torch_emc2.files import whole_file

__all__ = ["MetricsFile", "TensorBoardFile"]


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
