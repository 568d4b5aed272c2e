"""An experiment from its name to its table and figure."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from torch_emc2.config import Config, plain_words
from torch_emc2.experiments.cells import Cell, Row, run_cells
from torch_emc2.experiments.definitions import EXPERIMENTS, SCALES, Tuned, Variant, base_config, methods
from torch_emc2.experiments.figure import accuracy_panels, draw_panels, gradient_panels, group, markdown, sweep_panels
from torch_emc2.experiments.measure import read_curve
from torch_emc2.files import whole_file
from torch_emc2.run_folder import read_facts
from torch_emc2.settings.images import file_name_of

__all__ = ["run_experiment"]

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
        ValueError: an unknown name, scale, method or field; or cells failed, and the others are kept.
    """
    for kind, value, known in (("experiment", name, EXPERIMENTS), ("scale", scale, SCALES)):
        if value not in known:
            raise ValueError(f"no {kind} {value!r}; there are {', '.join(known)}")
    if unknown := set(tuned or {}) - set(methods()):
        raise ValueError(f"tuned names methods {sorted(unknown)}; there are {', '.join(methods())}")
    if jobs < 1 or not seeds:
        raise ValueError(f"jobs must be at least 1 and seeds not empty, got {jobs} and {list(seeds)}")
    experiment, size = EXPERIMENTS[name], SCALES[scale]
    dataset, tuned, overrides = dataset or experiment.dataset, tuned or {}, plain_words(overrides or [])
    base = base_config(dataset, scale, overrides)
    variants = list(experiment.variants(base, tuned))
    _refuse_ignored(name, overrides, base, variants)
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
        for variant in variants
        for seed in seeds
    ]
    shared = out / f"{file_name_of(dataset)}-{scale}"
    folder = shared / name
    rows = run_cells(cells, shared / "cells", jobs, folder / "results.csv")
    if experiment.figure == "sweep":
        panels = sweep_panels(rows, experiment.axis)
    else:
        curves = [row | {"curve": read_curve(shared / "cells" / row["cell"] / "curve.csv")} for row in rows]
        panels = gradient_panels(curves) if experiment.figure == "gradient" else accuracy_panels(curves)
    runs = [shared / "cells" / row["cell"] / "run" for row in rows]
    title = _title(experiment.title, dataset, scale, runs)
    with whole_file(folder / "figure.png") as file:
        draw_panels(panels, title, file)
    if name == "search":
        with whole_file(folder / "best.yaml") as file:
            file.write_text(yaml.safe_dump(_best(cells, rows), allow_unicode=True, sort_keys=False))
    table = markdown(rows, experiment.axis, _GRADIENT if experiment.figure == "gradient" else _ACCURACY)
    with whole_file(folder / "table.md") as file:
        file.write_text(f"{title}. {_circumstances(rows, dataset, scale, overrides, tuned)}\n\n{table}")
    return folder


def _best(cells: Sequence[Cell], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """For every method the settings whose probe is best on the validation part, mean over seeds."""
    configs = {cell.key: cell.config for cell in cells}
    best: dict[str, dict[str, float]] = {}
    for (series,), candidates in group(rows, "series").items():
        means = {x: np.mean([row["probe"] for row in own]) for (x,), own in group(candidates, "x").items()}
        config = configs[next(row["cell"] for row in candidates if row["x"] == max(means, key=means.__getitem__))]
        best[series] = {"optimizer.lr": config.optimizer.lr, "temperature": config.temperature}
    return best


def _refuse_ignored(name: str, overrides: Sequence[str], base: Config, variants: Sequence[Variant]) -> None:
    """Raise ValueError for a field given by the user that the experiment sets itself, in all of its runs."""
    for field in (argument.removeprefix("--").partition("=")[0] for argument in overrides if argument.startswith("--")):
        get = operator.attrgetter(field)
        if field in ("loss", "seed", "out") or all(get(variant.config) != get(base) for variant in variants):
            raise ValueError(f"--{field} is what {name} sets for its runs itself: leave it out")


def _title(what: str, dataset: str, scale: str, runs: Sequence[Path]) -> str:
    """Say what is shown, and of what."""
    counts = {str(read_facts(run).get("images", "")).partition(",")[0] for run in runs}
    images = f", {next(iter(counts))} images" if len(counts) == 1 and "" not in counts else ""
    smoke = "; a smoke test, no result" if scale == "smoke" else ""
    return f"{what}; {file_name_of(dataset)}{images}{smoke}"


def _circumstances(rows: Sequence[Row], dataset: str, scale: str, overrides: Sequence[str], tuned: Tuned) -> str:
    """Say what the rows are of, and where they were measured."""
    made = {
        f"torch-emc2 {row['torch_emc2']}, torch {row['torch']}, {row['device']}, {row['threads']} threads a run"
        for row in rows
    }
    searched = ", ".join(f"{name} {dict(fields)}" for name, fields in tuned.items())
    settings = " ".join([f"scale {scale}", *overrides]) + (f"; from a search: {searched}" if searched else "")
    return f"{dataset}, {settings}. Measured with {'; and '.join(sorted(made))}. Mean ± standard deviation over seeds."
