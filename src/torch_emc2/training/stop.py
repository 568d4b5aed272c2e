"""How a run ends early."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from torch_emc2.run_folder import resume_command

__all__ = ["StopOnSIGTERM"]


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
