"""Figures and tables of experiments: means and spreads over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from torch_emc2.losses.registry import ESTIMATORS

__all__ = [
    "Line",
    "Panel",
    "accuracy_panels",
    "draw_panels",
    "gradient_panels",
    "group",
    "markdown",
    "sweep_panels",
]

Row = dict[str, Any]

# Colours and markers of the methods, the same in every figure; other series take them in turn.
_STYLES = {method.title: (method.colour, method.marker) for row in ESTIMATORS.values() for method in row.methods}


_WIDE = 8  # letters; longer names on an axis are turned


class Line(NamedTuple):
    """One series: ``x`` (n,) and ``y`` (runs, n)."""

    label: str
    x: Sequence[float | str]
    y: np.ndarray


class Panel(NamedTuple):
    """One set of axes."""

    x_label: str
    y_label: str
    lines: list[Line]
    log_x: bool = False
    log_y: bool = False
    level: tuple[str, float] | None = None  # a dotted line


def sweep_panels(rows: Sequence[Row], axis: str) -> list[Panel]:
    """Accuracies over the places on the experiment's axis."""
    panels = []
    for number, label in (("probe", "linear probe, %"), ("knn1_euclidean", "1-NN, %")):
        lines = []
        for (series,), own in group(rows, "series").items():
            places = group(own, "x")
            values = [[100 * row[number] for row in cells] for cells in places.values()]
            lines.append(Line(series, [x for (x,) in places], np.array(values).T))
        numeric = all(isinstance(x, int | float) and x > 0 for line in lines for x in line.x)
        panels.append(Panel(axis, label, lines, log_x=numeric))
    return panels


def accuracy_panels(rows: Sequence[Row]) -> list[Panel]:
    """Accuracies along the runs; rows have their ``curve``."""
    return [
        _along(rows, "seconds", "seconds of training", "probe", "linear probe, %", 100),
        _along(rows, "samples", "samples seen", "probe", "linear probe, %", 100),
        _along(rows, "samples", "samples seen", "knn1_euclidean", "1-NN, %", 100),
    ]


def gradient_panels(rows: Sequence[Row]) -> list[Panel]:
    """Exact loss and gradient along the runs; rows have their ``curve``."""
    loss = _along(rows, "step", "step", "loss", "exact global loss")
    return [
        loss._replace(level=("all embeddings equal", rows[0]["collapsed"])),
        _along(rows, "step", "step", "gradient", "squared norm of its gradient")._replace(log_y=True),
        _along(rows, "step", "step", "error", "squared error of the step's gradient")._replace(log_y=True),
    ]


def _along(rows: Sequence[Row], x: str, x_label: str, y: str, y_label: str, factor: float = 1) -> Panel:
    lines = []
    for (series,), runs in group(rows, "series").items():
        along = np.mean([[point[x] for point in run["curve"]] for run in runs], axis=0)
        values = factor * np.array([[point[y] for point in run["curve"]] for run in runs])
        lines.append(Line(series, along.tolist(), values))
    return Panel(x_label, y_label, lines)


def draw_panels(panels: Sequence[Panel], title: str, out: Path) -> None:
    """Draw mean and standard deviation over the runs of every line as a PNG."""
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, line in enumerate(panel.lines):
            colour, marker = _STYLES.get(line.label) or [*_STYLES.values()][number % len(_STYLES)]
            mean = line.y.mean(0)
            spread = line.y.std(0, ddof=1) if len(line.y) > 1 else np.zeros_like(mean)
            x = [place.replace(", ", ",\n") if isinstance(place, str) else place for place in line.x]
            axes.plot(x, mean, color=colour, marker=marker, markersize=4, linewidth=1.5, label=line.label)
            low = np.maximum(mean - spread, line.y.min(0)) if panel.log_y else mean - spread  # which may be below 0
            axes.fill_between(x, low, mean + spread, color=colour, alpha=0.15, linewidth=0)
        if panel.level is not None:
            label, height = panel.level
            axes.axhline(height, color="#4a4a4a", linestyle=":", linewidth=1, label=label)
        if panel.log_x:
            axes.set_xscale("log", base=2)
            places = sorted({x for line in panel.lines for x in line.x})
            axes.set_xticks(places, [f"{x:g}" for x in places])
        if panel.log_y:
            axes.set_yscale("log")
        axes.set_xlabel(panel.x_label)
        axes.set_title(panel.y_label, fontsize=10, loc="left")
        if any(len(str(x)) > _WIDE for line in panel.lines for x in line.x if isinstance(x, str)):
            axes.tick_params(axis="x", labelrotation=30)
            for label in axes.get_xticklabels():
                label.set(horizontalalignment="right", rotation_mode="anchor")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    seeds = max(len(line.y) for panel in panels for line in panel.lines)
    what = f"{title}: {f'mean ± standard deviation over {seeds} seeds' if seeds > 1 else 'one seed'}"
    figure.suptitle(fill(what, 50 * len(panels)), fontsize=11)
    figure.savefig(out, format="png", dpi=150)


def group(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Group rows by the values of ``keys``, in the order of their first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def markdown(rows: Sequence[Row], axis: str, columns: dict[str, tuple[str, float, int]]) -> str:
    """Write a table with a row for each series and place on the axis: mean ± standard deviation over seeds.

    ``columns`` maps a number's name to its heading, the factor it is shown with, and its decimals.
    """
    lines = [
        f"| series | {axis} | " + " | ".join(heading for heading, _, _ in columns.values()) + " | seeds |",
        "|---|--:|" + "--:|" * (len(columns) + 1),
    ]
    for (series, x), cells in group(rows, "series", "x").items():
        shown = []
        for name, (_, factor, decimals) in columns.items():
            values = factor * np.array([cell[name] for cell in cells])
            spread = f" ± {values.std(ddof=1):.{decimals}f}" if len(values) > 1 else ""
            shown.append(f"{values.mean():.{decimals}f}{spread}")
        lines.append(f"| {series} | {x} | " + " | ".join(shown) + f" | {len(cells)} |")
    return "\n".join(lines) + "\n"
