"""Figures and tables of experiments: means and spreads over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["Line", "Panel", "draw_panels", "group", "markdown"]

_COLOURS = ("#8a8a8a", "#b07aa1", "#e39c37", "#5aa469", "#3b6ea8", "#d1453b", "#4a4a4a", "#76b7b2")
_MARKERS = "osD^vPX*"


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


def draw_panels(panels: Sequence[Panel], title: str, out: Path) -> None:
    """Draw mean and standard deviation over the runs of every line as a PNG."""
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, line in enumerate(panel.lines):
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            mean = line.y.mean(0)
            spread = line.y.std(0, ddof=1) if len(line.y) > 1 else np.zeros_like(mean)
            axes.plot(line.x, mean, color=colour, marker=marker, markersize=4, linewidth=1.5, label=line.label)
            axes.fill_between(line.x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        if panel.level is not None:
            label, height = panel.level
            axes.axhline(height, color="#4a4a4a", linestyle=":", linewidth=1, label=label)
        if panel.log_x:
            axes.set_xscale("log", base=2)
        if panel.log_y:
            axes.set_yscale("log")
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(out, format="png", dpi=150)


def group(rows: Iterable[dict[str, Any]], *keys: str) -> dict[Any, list[dict[str, Any]]]:
    """Group rows by the values of ``keys``, in the order of their first appearance."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def markdown(rows: Sequence[dict[str, Any]], axis: str, columns: dict[str, tuple[str, float, int]]) -> str:
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
