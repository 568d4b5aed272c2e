"""What a run looks like: training curves, and the errors of gradients."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torch_emc2.diagnostics import GradientError

__all__ = ["PANELS", "plot_curves", "plot_errors"]

# Title of the panel of each number. Its column may also be named "train/acceptance", "acceptance_step" or "lr-Adam".
PANELS = {
    "global_loss": "Global loss, estimated",
    "acceptance": "Acceptance rate",
    "carried_share": "Weight of carried negatives",
    "lr": "Learning rate",
}

_LINE, _GUIDE = "#3b6ea8", "#8a8a8a"


def plot_curves(metrics: Sequence[Mapping[str, float]] | str | Path, out: str | Path) -> None:
    """Draw a run's curves as a PNG, one panel for each of `PANELS` that the run has logged.

    Args:
        metrics: one mapping a logged row, with "step" (or "epoch") and any of the numbers; a row may miss some. Or the
            path of a run's metrics.csv, or of one that Lightning's `CSVLogger` writes.
        out: the file to write.

    Raises:
        ValueError: no column to draw.
    """
    rows = _read_csv(Path(metrics)) if isinstance(metrics, str | Path) else metrics
    columns = list(dict.fromkeys(name for row in rows for name in row))
    panels = {key: column for key in PANELS if (column := _find_column(key, columns))}
    if not panels:
        raise ValueError(f"nothing to draw in the columns {columns}; log one of {', '.join(PANELS)}")
    x = "step" if "step" in columns else "epoch"
    figure, grid = _subplots(1, len(panels), width=3.5 * len(panels), height=2.8)
    for axes, (key, column) in zip(grid[0], panels.items(), strict=True):
        points = [(row[x], row[column]) for row in rows if column in row]
        axes.plot(*zip(*points, strict=True), color=_LINE, linewidth=1.5, marker="." if len(points) < 20 else "")
        axes.set_title(PANELS[key], fontsize=11)
        axes.set_xlabel(x.capitalize())
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, format="png", dpi=150)


def plot_errors(errors: Mapping[str, GradientError], out: str | Path) -> None:
    """Draw squared error against the number of epochs averaged as a PNG: a line an estimator, with 1/n as a guide.

    Args:
        errors: of each estimator. There is a second panel where the errors at the parameters are given.
        out: the file to write.
    """
    panels = {"Gradient at the embeddings": dict(errors)}
    inner = {name: error.at_parameters for name, error in errors.items() if error.at_parameters is not None}
    if inner:
        panels["Gradient at the parameters"] = inner
    figure, grid = _subplots(1, len(panels), width=4 * len(panels) + 2, height=3.8, sharey=True)
    for axes, (title, shown) in zip(grid[0], panels.items(), strict=True):
        for place, (name, error) in enumerate(shown.items()):
            style = "-" if place < 10 else "--"  # there are ten colours
            axes.plot(error.epochs, error.squared_error, style, label=name, marker=".", color=f"C{place % 10}")
        lengths = next(iter(shown.values())).epochs
        start = min(error.squared_error[0] for error in shown.values())
        axes.plot(lengths, [start / n for n in lengths], ":", color=_GUIDE, label="1/n")
        axes.set(xscale="log", yscale="log", xlabel="Epochs averaged", xticks=lengths, xticklabels=lengths)
        axes.minorticks_off()
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("Squared error, relative")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(out, format="png", dpi=150)


def _read_csv(path: Path) -> list[dict[str, float]]:
    """Read rows of numbers; the logger leaves the cells of unlogged numbers empty."""
    with path.open(newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def _find_column(key: str, columns: Sequence[str]) -> str | None:
    return next((name for name in columns if re.fullmatch(rf"(.*/)?{key}([-_/].*)?", name)), None)


def _subplots(rows: int, columns: int, width: float, height: float, **layout: Any) -> tuple[Figure, Any]:
    """Make a figure without pyplot, whose global state and choice of a display are no business of a library."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)
