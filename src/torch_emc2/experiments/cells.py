"""Cells: one run each, measured, in a process of its own; what is finished is kept."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, cast

import torch
from filelock import FileLock  # torch's own dependency
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

import torch_emc2
from torch_emc2.config import Config, to_yaml
from torch_emc2.experiments.measure import AccuracyCurve, Curve, GradientCurve, Part
from torch_emc2.files import whole_file
from torch_emc2.locks import only_writer
from torch_emc2.training import train

__all__ = ["Cell", "Row", "run_cells"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A run and what is measured of it.

    Attributes:
        series: the line of the figure that it belongs to.
        x: its place on the experiment's axis.
        config: the run, with its seed; the runner chooses the folder.
        measured: accuracy, or the exact gradient.
        points: of the curve.
        labelled: most labelled images used, None for all.
        part: that is classified.
    """

    series: str
    x: float | str
    config: Config
    measured: Literal["accuracy", "gradient"]
    points: int
    labelled: int | None
    part: Part

    @property
    def key(self) -> str:
        """A hash of settings, versions and GPU: equal cells of several experiments are run once."""
        config = to_yaml(replace(self.config, out="")) + f"{torch_emc2.__version__} {torch.__version__} {_gpu()}"
        return hashlib.sha256(
            f"{config}{self.measured} {self.points} {self.labelled} {self.part}".encode()
        ).hexdigest()[:12]


def run_cells(cells: Sequence[Cell], folder: Path, jobs: int, results: Path) -> list[Row]:
    """Run the cells that are not finished, and return a row a cell, in order.

    Each has a folder ``folder/KEY`` with its log, its curve.csv and, once it is finished, row.json. One that was
    interrupted is run again from its start, so that its seconds are those of one piece. ``results`` is written anew
    after each.

    Raises:
        ValueError: cells failed; the others are finished. It names the log of the first.
    """
    rows = {cell.key: row for cell in cells if (row := _finished(folder / cell.key)) is not None}
    todo = {cell.key: cell for cell in cells if cell.key not in rows}
    failed = []
    _write(cells, rows, results)
    try:
        with closing(_done(todo, folder, jobs)) as done:
            for cell in done:
                row = _finished(folder / cell.key)
                if row is None:
                    failed.append(folder / cell.key / "log.txt")
                else:
                    rows[cell.key] = row
                    _write(cells, rows, results)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(rows)} of {len(cells)} runs are finished, the same command goes on") from None
    if failed:
        lines = failed[0].read_text().strip().splitlines() if failed[0].exists() else []
        reason = lines[-1] if lines else "it was killed"
        raise ValueError(f"{len(failed)} of {len(cells)} cells failed, the others are kept; {failed[0]}: {reason}")
    return _rows(cells, rows)


def _done(todo: Mapping[str, Cell], folder: Path, jobs: int) -> Generator[Cell]:
    """Run cells, so many at a time, in a process each, and give each once its process has ended, however it did."""
    threads = max(1, _threads() // jobs)
    # A server that has imported all of it once and has no threads: its forks start at once and measure alone.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "numba", "torch.utils.tensorboard"])  # which a run's start imports
    _start_server()
    waiting, running = list(todo.items()), dict[BaseProcess, Cell]()
    try:
        with tqdm(total=len(todo), desc="Cells", disable=None) as bar:
            while waiting or running:
                while waiting and len(running) < jobs:
                    key, cell = waiting.pop(0)
                    process = context.Process(target=_run, args=(cell, folder / key, threads))
                    process.start()
                    running[process] = cell
                wait([process.sentinel for process in running])
                for ended in [process for process in running if not process.is_alive()]:
                    cell = running.pop(ended)
                    bar.set_postfix_str(f"{cell.series}, {cell.x}, seed {cell.config.seed}")
                    bar.update()
                    yield cell
    finally:
        for left in running:
            with suppress(ProcessLookupError):  # not yet the first of its group
                os.killpg(cast(int, left.pid), signal.SIGKILL)  # the loader's workers too
            left.kill()
            left.join()


def _threads() -> int:
    """Return how many threads all cells together may use: a core each, unless the user says otherwise."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = os.cpu_count() or 1
    return min(int(given), cores) if given.isdecimal() and int(given) else cores


def _start_server() -> None:
    """Start what forks the cells' processes. They leave Ctrl-C to the parent, which ends them."""
    killed = "ignore:resource_tracker:UserWarning"  # it tells of semaphores that it removes after a killed process
    sys.warnoptions.append(killed)
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(killed)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(cell: Cell, folder: Path, threads: int) -> None:
    """Run a cell from its start; it leaves row.json, or a log that tells why not."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # those of numpy and scikit-learn
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # another experiment may be at it
        if _finished(folder) is None:
            _measure(cell, folder)


def _end_with_parent() -> None:
    """End this process and its own when the experiment's has ended, however that did."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _measure(cell: Cell, folder: Path) -> None:
    run = folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    with _logging_to(folder / "log.txt"):
        try:
            with only_writer(run):
                pass  # nobody goes on with it by hand
            shutil.rmtree(run, ignore_errors=True)
            config = replace(cell.config, out=str(run))
            curve: Curve
            if cell.measured == "accuracy":
                curve = AccuracyCurve(config, cell.points, cell.labelled, cell.part)
            else:
                curve = GradientCurve(cell.points)
            train(config, callbacks=[curve])
        except BaseException:  # SystemExit too: what ends a cell is the cell's
            traceback.print_exc()
            return
    curve.write(folder / "curve.csv")
    shutil.rmtree(run / "checkpoints")  # large, and of no use once the run is whole
    row = {
        **curve.rows[-1],
        "peak_memory_mb": curve.peak_memory_mb,
        "device": _gpu() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_emc2": torch_emc2.__version__,
    }
    with whole_file(folder / "row.json") as file:
        file.write_text(json.dumps(row) + "\n")


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _finished(folder: Path) -> Row | None:
    file = folder / "row.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _rows(cells: Sequence[Cell], rows: dict[str, Row]) -> list[Row]:
    return [
        {"series": cell.series, "x": cell.x, "seed": cell.config.seed, "cell": cell.key, **rows[cell.key]}
        for cell in cells
        if cell.key in rows
    ]


def _write(cells: Sequence[Cell], rows: dict[str, Row], results: Path) -> None:
    table = _rows(cells, rows)
    results.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(results) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]) if table else ["series", "x", "seed", "cell"])
        writer.writeheader()
        writer.writerows(table)


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Send all that this process prints, libraries included, to a file."""
    sys.stdout.flush(), sys.stderr.flush()
    with file.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
        sys.stdout.flush(), sys.stderr.flush()
