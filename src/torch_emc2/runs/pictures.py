"""What a run looks like: training curves, and the errors of gradients."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torch_emc2.diagnostics import GradientError

__all__ = ["PANELS", "plot_curves", "plot_errors", "smoothed"]

# Title of the panel of each number, and what it says. Its column may also be named "train/acceptance",
# "acceptance_step" or "lr-Adam".
PANELS = {
    "global_loss": ("Global loss of a batch, estimated (nats)", "0: all embeddings are equal; lower is better"),
    "positive_similarity": ("Similarity of a sample's views (cosine)", "up to 1"),
    "slow_similarity": ("Similarity to slow embeddings (cosine)", "1: nothing moves any more"),
    "acceptance": ("Acceptance (share of proposals)", "1: negatives are alike; near 0: chains hardly move"),
    "carried_share": ("Weight of carried negatives (share)", "how much of a row's negatives its batch lacks"),
    "normaliser_ratio": ("Average normaliser over the batch's", "about 1: it keeps up with the encoder"),
    "lr": ("Learning rate", "warm-up, then half a cosine to 0"),
}
_ABREAST = 4  # panels

_EXACT = 1e-6  # smaller errors are rounding's, and drawn there
_SMOOTHED = 40  # points, from which on a mean over a tenth of them is drawn too

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
    lines = math.ceil(len(panels) / _ABREAST)
    abreast = math.ceil(len(panels) / lines)
    figure, grid = _subplots(lines, abreast, width=3.5 * abreast, height=3 * lines)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (key, column) in zip(grid.flat, panels.items(), strict=False):
        places, values = np.array([(row[x], row[column]) for row in rows if column in row]).T
        smooth = None if key == "lr" else smoothed(values)
        axes.plot(
            places, values, color=_LINE, linewidth=1.5, alpha=1 if smooth is None else 0.3, marker=_marker(values)
        )
        if smooth is not None:
            axes.plot(places, smooth, color=_LINE, linewidth=1.8)
        title, meaning = PANELS[key]
        axes.set_title(title, fontsize=10.5, loc="left", pad=20)
        axes.text(0, 1.03, meaning, fontsize=8, color="#5a5a5a", transform=axes.transAxes)
        axes.set_xlabel(x.capitalize())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # no power of ten beside the axis
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
            seen = np.maximum(error.squared_error, _EXACT)
            axes.plot(error.epochs, seen, style, label=name, marker=".", color=f"C{place % 10}")
        lengths = next(iter(shown.values())).epochs
        start = np.median([max(error.squared_error[0], _EXACT) for error in shown.values()])
        axes.plot(lengths, [start / n for n in lengths], ":", color=_GUIDE, label="1/n, without bias")
        axes.set(xscale="log", yscale="log", xlabel="epochs averaged", xticks=lengths, xticklabels=lengths)
        axes.minorticks_off()
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("squared error, relative (lower is better)")
    figure.suptitle(
        "A line that falls beside 1/n has no bias; one that levels off is at its bias, which no averaging removes",
        fontsize=9,
        color="#5a5a5a",
    )
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(out, format="png", dpi=150)


def _marker(values: np.ndarray) -> str:
    return "." if len(values) < 20 else ""


def smoothed(values: np.ndarray) -> np.ndarray | None:
    """Return the running mean (n,) over a tenth of a curve's values (n,); None where they are few enough to be read."""
    return _running_mean(values, len(values) // 10) if len(values) >= _SMOOTHED else None


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return means over so many values around each; at the ends, of those that there are."""
    ones = np.ones(width)
    mean: np.ndarray = np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")
    return mean


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
