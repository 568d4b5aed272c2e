"""What stops a run stops all of its ranks."""

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from torch_emc2.training.stop import StopOnSIGTERM


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), [signal.SIGKILL]),
        (ValueError("a loss that is not finite, which all ranks find"), []),
        (SIGTERMException(), []),
        (KeyboardInterrupt(), []),
    ],
)
def test_other_ranks_are_ended_where_the_one_that_writes_cannot(
    error: BaseException, ended: list[signal.Signals], tmp_path: Path
) -> None:
    signals: list[signal.Signals] = []
    stop, launcher = StopOnSIGTERM(tmp_path), SimpleNamespace(kill=signals.append)
    stop.on_exception(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)), None, error)  # type: ignore[arg-type]
    assert signals == ended
    stop.on_exception(SimpleNamespace(strategy=SimpleNamespace(launcher=None)), None, error)  # type: ignore[arg-type]
