"""An experiment from its name to its table and figure."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from torch_emc2.config import Config
from torch_emc2.experiments.cells import Cell, Row, run_cells
from torch_emc2.experiments.definitions import EXPERIMENTS, SCALES, Tuned, base_config
from torch_emc2.experiments.figure import Line, Panel, draw_panels, group, markdown
from torch_emc2.experiments.measure import read_curve
from torch_emc2.files import whole_file

__all__ = ["read_tuned", "run_experiment"]

_ACCURACY = {
    "probe": ("linear probe, %", 100.0, 2),
    "knn1_euclidean": ("1-NN, %", 100.0, 2),
    "seconds": ("seconds", 1.0, 0),
    "peak_memory_mb": ("peak MB", 1.0, 0),
}
_GRADIENT = {
    "loss": ("exact loss", 1.0, 4),
    "collapsed": ("loss if collapsed", 1.0, 4),
    "gradient": ("‖gradient‖²", 1.0, 5),
    "error": ("‖step's - exact‖²", 1.0, 5),
    "seconds": ("seconds", 1.0, 0),
}


def run_experiment(
    name: str,
    *,
    dataset: str | None = None,
    scale: str = "full",
    seeds: Sequence[int] = (0, 1, 2),
    out: Path = Path("results"),
    jobs: int = 1,
    tuned: Tuned | None = None,
    overrides: list[str] | None = None,
) -> Path:
    """Run what is not finished of an experiment and return its folder, with results.csv, table.md and figure.png.

    The folder is ``out/DATASET-SCALE/NAME``; its cells are in ``out/DATASET-SCALE/cells``, where all experiments share
    them. ``search`` also writes best.yaml, what `read_tuned` reads.

    Args:
        name: one of `EXPERIMENTS`.
        dataset: any that `open_dataset` knows; by default the experiment's own.
        scale: one of `SCALES`.
        seeds: of the runs.
        out: folder of all results.
        jobs: cells at a time; they share the cores, so compare seconds at equal jobs.
        tuned: fields that a search chose, for each method.
        overrides: of the preset, as on the command line.

    Raises:
        ValueError: an unknown name, scale or field.
        RuntimeError: cells failed.
    """
    for kind, value, known in (("experiment", name, EXPERIMENTS), ("scale", scale, SCALES)):
        if value not in known:
            raise ValueError(f"no {kind} {value!r}; there are {', '.join(known)}")
    if jobs < 1 or not seeds:
        raise ValueError(f"jobs must be at least 1 and seeds not empty, got {jobs} and {list(seeds)}")
    experiment, size = EXPERIMENTS[name], SCALES[scale]
    dataset = dataset or experiment.dataset
    base: Config = base_config(dataset, scale, overrides or [])
    cells = [
        Cell(
            variant.series,
            variant.x,
            replace(variant.config, seed=seed),
            measured="gradient" if experiment.figure == "gradient" else "accuracy",
            points=1 if experiment.figure == "sweep" else size.points,
            labelled=size.labelled,
            part="validation" if name == "search" else "test",
        )
        for variant in experiment.variants(base, tuned or {})
        for seed in seeds
    ]
    shared = out / f"{Path(dataset).name.removeprefix('folder:')}-{scale}"
    folder = shared / name
    rows = run_cells(cells, shared / "cells", jobs, folder / "results.csv")
    columns = _GRADIENT if experiment.figure == "gradient" else _ACCURACY
    _draw(rows, experiment.figure, experiment.axis, experiment.title, shared / "cells", folder / "figure.png")
    if name == "search":
        with whole_file(folder / "best.yaml") as file:
            file.write_text(yaml.safe_dump(_best(cells, rows), allow_unicode=True, sort_keys=False))
    with whole_file(folder / "table.md") as file:
        file.write_text(
            f"{experiment.title}. {_circumstances(dataset, scale)}\n\n{markdown(rows, experiment.axis, columns)}"
        )
    return folder


def read_tuned(file: Path) -> Tuned:
    """Read the best.yaml of a search.

    Raises:
        ValueError: it is none.
    """
    content: Any = yaml.safe_load(file.read_text())
    if not isinstance(content, dict) or not all(isinstance(fields, dict) for fields in content.values()):
        raise ValueError(f"{str(file)!r} is not a search's best.yaml: it must map methods to fields")
    return content


def _best(cells: Sequence[Cell], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """For every method the settings whose probe is best on the validation part, mean over seeds."""
    configs = {cell.key: cell.config for cell in cells}
    best: dict[str, dict[str, float]] = {}
    for (series,), candidates in group(rows, "series").items():
        means = {x: np.mean([row["probe"] for row in own]) for (x,), own in group(candidates, "x").items()}
        config = configs[next(row["cell"] for row in candidates if row["x"] == max(means, key=means.__getitem__))]
        best[series] = {"optimizer.lr": config.optimizer.lr, "temperature": config.temperature}
    return best


def _draw(rows: Sequence[Row], kind: str, axis: str, title: str, cells: Path, out: Path) -> None:
    by_series = group(rows, "series")
    panels: list[Panel] = []
    if kind == "sweep":
        for number, label in (("probe", "linear probe, %"), ("knn1_euclidean", "1-NN, %")):
            lines = []
            for (series,), own in by_series.items():
                by_x = group(own, "x")
                values = [[100 * row[number] for row in places] for places in by_x.values()]
                lines.append(Line(series, [x for (x,) in by_x], np.array(values).T))
            numeric = all(isinstance(x, int | float) and x > 0 for line in lines for x in line.x)
            panels.append(Panel(axis, label, lines, log_x=numeric))
    else:
        curves = {
            series: [read_curve(cells / row["cell"] / "curve.csv") for row in own]
            for (series,), own in by_series.items()
        }

        def panel(x: str, y: str, factor: float, x_label: str, y_label: str, **more: Any) -> Panel:
            lines = [
                Line(
                    series,
                    np.mean([[row[x] for row in curve] for curve in runs], axis=0).tolist(),
                    factor * np.array([[row[y] for row in curve] for curve in runs]),
                )
                for series, runs in curves.items()
            ]
            return Panel(x_label, y_label, lines, **more)

        if kind == "curves":
            panels = [
                panel("seconds", "probe", 100, "seconds of training", "linear probe, %"),
                panel("samples", "probe", 100, "samples seen", "linear probe, %"),
                panel("samples", "knn1_euclidean", 100, "samples seen", "1-NN, %"),
            ]
        else:
            level = ("all embeddings equal", rows[0]["collapsed"])
            panels = [
                panel("step", "loss", 1, "step", "exact global loss", level=level),
                panel("step", "gradient", 1, "step", "squared norm of its gradient", log_y=True),
                panel("step", "error", 1, "step", "squared error of the step's gradient", log_y=True),
            ]
    with whole_file(out) as path:
        draw_panels(panels, title, path)


def _circumstances(dataset: str, scale: str) -> str:
    where = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    version = f", commit {commit.stdout.strip()}" if commit.returncode == 0 else ""
    return (
        f"{dataset}, scale {scale}; torch {torch.__version__}, {device}{version}. Mean ± standard deviation over seeds."
    )
