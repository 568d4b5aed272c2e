"""What a run tells of itself, against its metrics and counts by hand."""

import fcntl
import io
import logging
import os
import struct
import sys
import termios
from dataclasses import replace

import pytest

from outcomes import interrupt, outcome
from torch_emc2.config import Config
from torch_emc2.training import progress, train


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (90061, "1 d 1 h")],
)
def test_a_duration_has_two_units(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words


def test_an_epochs_line_has_its_mean(
    tiny: Config, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "torch_emc2")
    rows = outcome(train(replace(tiny, log_every_steps=1)))[3]
    means = [sum(float(row["global_loss"]) for row in rows if row["epoch"] == str(epoch)) / 4 for epoch in range(2)]
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.split()[4]) for line in lines] == pytest.approx(means, abs=1e-3)
    assert "(0: all embeddings are equal; lower is better)" in lines[0]
    assert "all embeddings" not in lines[1]
    told = [record.getMessage() for record in caplog.records]
    assert f"Global loss: {means[1]:.3f} in the last epoch, {means[0]:.3f} in the first; lower is better." in told


def test_the_bar_goes_on_over_epochs_and_from_where_a_run_was_stopped(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    bars = []

    class Bar(progress.tqdm):  # type: ignore[type-arg,misc]
        def close(self) -> None:
            if not self.disable:
                bars.append((self.initial, self.n, self.total, self.desc, self.postfix))
            super().close()

    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(sys, "stdout", Terminal())
    interrupt(tiny, 5, monkeypatch)
    train(tiny, resume=True)
    stopped, ended = (bar for bar in bars if bar[2] == 8)
    assert stopped[:4] == (0, 5, 8, "Epoch 2/2: ")
    assert ended[:4] == (4, 8, 8, "Epoch 2/2: ")
    assert ended[4].startswith("global loss -")
    assert "Epoch" not in sys.stdout.getvalue()  # type: ignore[attr-defined]  # tqdm's goes to stderr


def test_a_terminal_that_does_not_know_its_width_has_a_bar_of_80_columns() -> None:
    ours, theirs = os.openpty()  # of 0 columns, as containers may have them
    with open(ours), open(theirs, "w") as terminal:
        assert progress.room_of(terminal) == {"ncols": 80, "nrows": 24}
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        assert progress.room_of(terminal) == {"dynamic_ncols": True}
    assert progress.room_of(io.StringIO()) == {"ncols": 80, "nrows": 24}


def test_the_time_that_is_left_is_at_the_rate_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    told = progress.Progress(interactive=False)
    told.begun, told.first, told.steps, told.total = 100.0, 10, 30, 80
    monkeypatch.setattr(progress.time, "monotonic", lambda: 140.0)
    assert told.left() == 40 * 50 / 20
