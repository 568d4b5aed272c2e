"""One page on a run, or on several side by side: a single file, without scripts, that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import csv
import json
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torch_emc2 import __version__
from torch_emc2.config import Config, recorded_config, to_yaml
from torch_emc2.files import whole_file
from torch_emc2.run_folder import require_finished
from torch_emc2.runs.pictures import PANELS, smoothed

__all__ = ["write_report"]

# What is in evaluation.json, and what it says.
_NUMBERS = {
    "probe": ("Linear probe, %", "of test images that a linear classifier of the features puts into their class"),
    "knn1_cosine": ("1-NN, cosine, %", "of test images whose nearest training image is of their class"),
    "knn20_cosine": ("20-NN, cosine, %", "the same by a vote of the nearest twenty"),
    "retrieval": ("Retrieval of the other view, %", "of views to which, of all others, the same image's is nearest"),
    "alignment": ("Alignment", "squared distance of an image's two views, from 0 to 4: less is better"),
    "uniformity": ("Uniformity", "how evenly images spread, from -8 to 0: less is better, 0 where all are equal"),
    "effective_rank": ("Effective rank", "directions that the features fill, up to their number: more is better"),
}
_PICTURES = {
    "neighbours.png": "Test images, and the training images nearest to them by the cosine of features",
    "map.png": "A map of the embeddings: what is near on it is, mostly, alike to the encoder",
    "diagnosis.png": "Squared error of each estimator's gradient, relative to the exact one's, by epochs averaged",
}
_NOT_COMPARED = {"seed", "out"}
_INK = "#7b7c7d"  # stands for the page's text colour, light or dark
_STYLES = "solid", "dashed", "dotted"
_COLOURS = ("#3b7dd8", "#d9822b", "#2e9e6b", "#c2459b", "#8a6fd1", "#b0a02a")


@dataclass(frozen=True)
class _Series:
    """Runs that differ in nothing but their seeds."""

    name: str
    config: Config
    runs: list[Path]

    @property
    def summary(self) -> str:
        """What was trained, in a line."""
        own = self.config
        limit = "" if own.data.limit is None else f", at most {own.data.limit} images"
        length = f"{own.epochs} epochs in batches of {own.batch_size}"
        return (
            f"{own.data.name}{limit}: {own.model.backbone}, loss {own.loss}, temperature {own.temperature:g}, {length}"
        )

    def curve(self, column: str) -> list[tuple[float, float, float]]:
        """Return (step, mean, standard deviation) where all runs have logged a number."""
        seen: dict[float, list[float]] = defaultdict(list)
        for run in self.runs:
            with (run / "metrics.csv").open(newline="") as file:
                for row in csv.DictReader(file):
                    if row.get(column) and row.get("step"):
                        seen[float(row["step"])].append(float(row[column]))
        return [(step, *_spread(values)) for step, values in sorted(seen.items()) if len(values) == len(self.runs)]

    def numbers(self) -> dict[str, dict[str, list[float]]]:
        """Return each encoder's numbers, one a run that was evaluated."""
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in self.runs:
            if (file := run / "evaluation.json").is_file():
                for encoder, numbers in json.loads(file.read_text())["numbers"].items():
                    for name, value in numbers.items():
                        found[encoder][name].append(value)
        return found


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write a page of settings, curves, accuracies beside their baselines, diagnosis and pictures.

    Runs that differ in nothing but the seed and the folder are one series: its numbers are means ± standard deviations.
    What was not evaluated or diagnosed is named, with the command.

    Args:
        runs: folders of finished runs.
        out: the HTML file, which appears once it is whole.

    Raises:
        ValueError: a folder is no finished run, or is given twice.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError(f"a run is given twice among {', '.join(map(str, runs))}: its seeds would count double")
    for run in runs:
        require_finished(run)
    series = _series(runs)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        files("torch_emc2.runs").joinpath("report.html").read_text(encoding="utf-8")
    )
    with whole_file(out) as file:
        file.write_text(
            page.render(
                title=" · ".join(each.name for each in series),
                version=__version__,
                series=series,
                lines=[_line(i) for i in range(len(series))],
                curves=list(_curves(series)),
                accuracies=_accuracies(series),
                missing=[
                    f"emc2 evaluate {shlex.quote(str(run))} --baselines"
                    for run in runs
                    if not (run / "evaluation.json").is_file()
                ],
                pictures=[
                    (run, words, _data_uri(run / name))
                    for name, words in _PICTURES.items()
                    for run in (each.runs[0] for each in series)
                    if (run / name).is_file()
                ],
                not_drawn=[
                    f"emc2 {command} {shlex.quote(str(run))}"
                    for name, command in (("map.png", "map"), ("diagnosis.png", "diagnose"))
                    for run in (each.runs[0] for each in series)
                    if not (run / name).is_file()
                ],
                diagnoses=[
                    (run, _tables((run / "diagnosis.md").read_text(encoding="utf-8")))
                    for run in runs
                    if (run / "diagnosis.md").is_file()
                ],
                settings=[(each.name, to_yaml(each.config)) for each in series],
            ),
            encoding="utf-8",
        )


def _series(runs: Sequence[Path]) -> list[_Series]:
    alike: dict[str, list[Path]] = defaultdict(list)
    configs: dict[str, Config] = {}
    for run in runs:
        config = recorded_config(run)
        key = json.dumps(_compared(config), sort_keys=True)
        alike[key].append(run)
        configs.setdefault(key, config)
    flat = [_compared(config) for config in configs.values()]
    differing = [name for name in dict.fromkeys(key for each in flat for key in each) if _differs(name, flat)]
    if not differing:
        ((key, own),) = alike.items()
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        return [_Series(own[0].name + more, configs[key], own)]
    return [
        _Series(", ".join(f"{name}={_compared(configs[key]).get(name)}" for name in differing), configs[key], own)
        for key, own in alike.items()
    ]


def _differs(name: str, flat: Sequence[dict[str, Any]]) -> bool:
    return len({json.dumps(each.get(name)) for each in flat}) > 1


def _compared(config: Config) -> dict[str, Any]:
    """Return a config's fields by their dotted names, without those in which runs of a series differ."""

    def fields(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield prefix, value
            return
        for name, inner in value.items():
            yield from fields(f"{prefix}.{name}" if prefix else name, inner)

    return {name: value for name, value in fields("", asdict(config)) if name not in _NOT_COMPARED}


def _curves(series: Sequence[_Series]) -> Iterator[tuple[str, str, str]]:
    """Draw each number that some run has logged: title, words, and an SVG that takes the page's colour."""
    for column, (title, words) in PANELS.items():
        if column == "global_loss":
            words += ", at one temperature and batch size"
        curves = [each.curve(column) for each in series]
        if any(curves):
            yield title, words, _drawn(curves, title, smooth=column != "lr")


def _drawn(curves: Sequence[list[tuple[float, float, float]]], title: str, *, smooth: bool) -> str:
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": title}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with mpl.rc_context(style):
        figure = Figure((4.2, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for i, curve in enumerate(curves):
            if not curve:
                continue
            steps, means, spreads = zip(*curve, strict=True)
            line: Any = dict(zip(("color", "linestyle"), _line(i), strict=True))
            around = smoothed(np.array(means)) if smooth else None
            axes.plot(steps, means, **line, linewidth=1.5, alpha=1 if around is None else 0.3)
            if around is not None:
                axes.plot(steps, around, **line, linewidth=1.8)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=line["color"], alpha=0.2, linewidth=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _line(series: int) -> tuple[str, str]:
    """Return a colour and a style, by names that are CSS's and Matplotlib's alike."""
    return _COLOURS[series % len(_COLOURS)], _STYLES[series // len(_COLOURS) % len(_STYLES)]


def _accuracies(series: Sequence[_Series]) -> tuple[list[str], list[list[str]], list[tuple[str, str]]]:
    """Return a table's head and rows, an encoder of a series each, the trained one first; and what its numbers say."""
    rows = [(each.name, encoder, numbers) for each in series for encoder, numbers in each.numbers().items()]
    said = {name: words for name, words in _NUMBERS.items() if any(name in numbers for *_, numbers in rows)}
    shown = {name: title for name, (title, _) in said.items()}

    def entry(name: str, values: Sequence[float]) -> str:
        if not values:
            return "–"
        digits, scale = (2, 100) if shown[name].endswith("%") else (3, 1)
        mean, spread = _spread([scale * value for value in values])
        return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")

    table = [
        [name, encoder, *(entry(column, numbers[column]) for column in shown), str(max(map(len, numbers.values())))]
        for name, encoder, numbers in rows
    ]
    return ["run", "encoder", *shown.values(), "runs"], table, list(said.values())


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _tables(markdown: str) -> list[tuple[str, list[list[str]]]]:
    """Return the text before each table of a page, and its rows."""
    found: list[tuple[str, list[list[str]]]] = [("", [])]
    for line in markdown.splitlines():
        if not line.startswith("|"):
            if found[-1][1]:
                found.append(("", []))
            found[-1] = (f"{found[-1][0]} {line}".strip(), [])
        elif not set(line) <= set("|-: "):
            found[-1][1].append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def _data_uri(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
