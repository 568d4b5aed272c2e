"""Metrics are whole, in order, and there in time."""

import csv
import errno
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outcomes import outcome
from torch_emc2.config import Config
from torch_emc2.training import train
from torch_emc2.training.checkpoints import WholeCheckpoints
from torch_emc2.training.metrics import MetricsFile


def metrics_file(path: Path) -> MetricsFile:
    """Give a metrics file as a run that starts or goes on has it."""
    file = MetricsFile(path)
    file.setup()
    return file


def test_metrics_file_widens_and_cuts(tmp_path: Path) -> None:
    file = metrics_file(tmp_path / "metrics.csv")
    file.write({"loss": 1.0}, 0)
    file.write({"loss": 2.0, "skipped": 1.0}, 1)
    file.write({"loss": 3.0}, 2)
    again = metrics_file(tmp_path / "metrics.csv")
    again.write({"loss": 4.0}, 1)
    again.write({"loss": 5.0}, 2)
    with (tmp_path / "metrics.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert rows == [
        {"step": "0", "loss": "1", "skipped": ""},
        {"step": "1", "loss": "4", "skipped": ""},
        {"step": "2", "loss": "5", "skipped": ""},
    ]


@pytest.mark.parametrize("rest", ["1", "1,0.", "1,0.5,2.0\n", ",\n", "x,1\n"])
def test_a_line_that_is_not_whole_is_left_out(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics_file(path).write({"loss": 1.0}, 0)
    with path.open("a") as file:
        file.write(rest)
    again = metrics_file(path)
    again.write({"loss": 2.0}, 1)
    again.write({"loss": 3.0}, 2)
    assert path.read_text().splitlines() == ["step,loss", "0,1", "1,2", "2,3"]
    path.write_text("loss,step\n1\n")
    assert metrics_file(path).rows == []


@pytest.mark.parametrize(("accumulate", "every", "steps"), [(1, 3, [2, 5]), (1, 10, [3, 7]), (2, 1, [0, 1, 2, 3])])
def test_a_row_each_so_many_steps(accumulate: int, every: int, steps: list[int], tiny: Config) -> None:
    rows = outcome(train(replace(tiny, accumulate=accumulate, log_every_steps=every)))[3]
    assert [int(row["step"]) for row in rows] == steps
    assert [int(row["epoch"]) for row in rows] == [step // math.ceil(4 / accumulate) for step in steps]


def test_a_row_is_written_before_the_checkpoint_of_its_step(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    save, seen = WholeCheckpoints.save_checkpoint, []

    def spy(self: WholeCheckpoints, checkpoint: Any, path: Path, **options: Any) -> None:
        with (Path(tiny.out) / "metrics.csv").open(newline="") as file:
            seen.append((checkpoint["global_step"], len(list(csv.DictReader(file)))))
        save(self, checkpoint, path)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", spy)
    train(replace(tiny, checkpoint_every_steps=1, epochs=1))
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4), (4, 4)]


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    file = metrics_file(path)
    file.write({"loss": 1.0}, 0)
    whole = path.read_text()

    class Full(csv.DictWriter):  # type: ignore[type-arg]
        def __init__(self, stream: Any, *args: Any) -> None:
            super().__init__(stream, *args)
            self.stream = stream

        def writerow(self, row: Any) -> None:
            self.stream.write("1,")
            self.stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(csv, "DictWriter", Full)
    with pytest.raises(OSError, match=rf"{path}: row 1 was not written: No space left on device"):
        file.write({"loss": 2.0}, 1)
    assert path.read_text() == whole
