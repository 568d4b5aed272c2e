"""Tables and figures against means and spreads worked out by hand."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from torch_emc2.experiments.figure import Line, Panel, draw_panels, group, markdown


def test_a_table_has_means_and_sample_deviations() -> None:
    rows = [
        {"series": "A", "x": 4, "probe": 0.5},
        {"series": "A", "x": 4, "probe": 0.7},
        {"series": "B", "x": 8, "probe": 0.25},
    ]
    assert markdown(rows, "size", {"probe": ("probe, %", 100, 1)}) == (
        "| series | size | probe, % | seeds |\n|---|--:|--:|--:|\n| A | 4 | 60.0 ± 14.1 | 2 |\n| B | 8 | 25.0 | 1 |\n"
    )


def test_groups_keep_the_order_of_rows() -> None:
    rows = [{"a": 2, "b": 1}, {"a": 1, "b": 1}, {"a": 2, "b": 2}]
    assert group(rows, "a") == {(2,): [rows[0], rows[2]], (1,): [rows[1]]}


def test_a_figure_shows_every_line(tmp_path: Path) -> None:
    lines = [
        Line("one", [1, 2, 4], np.array([[1.0, 2, 3], [2, 3, 4]])),
        Line("two", [1, 2, 4], np.array([[3.0, 2, 1]])),
    ]
    panels = [
        Panel("x", "y", lines, log_x=True, level=("level", 2.0)),
        Panel("x", "y", [Line("one", ["a", "b"], np.array([[1.0, 2.0]]))], log_y=True),
    ]
    draw_panels(panels, "Title", tmp_path / "figure.png")
    pixels = np.array(Image.open(tmp_path / "figure.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0x8A, 0x8A, 0x8A), (0xB0, 0x7A, 0xA1)):
        assert (pixels == colour).all(1).sum() > 100


def test_long_titles_and_names_have_room_and_a_band_on_a_logarithmic_axis_stays_positive(tmp_path: Path) -> None:
    names = [f"lr {rate}, temperature 0.07" for rate in (0.1, 0.01, 0.001, 0.0001)]
    runs = np.array([[1.0, 1, 1, 1], [100, 100, 100, 100]])  # of mean 50.5, and a deviation of 70
    panels = [
        Panel("settings", "a number with a rather long name, in a unit", [Line("one", names, runs)]),
        Panel("step", "y", [Line("one", [1, 2, 3, 4], runs)], log_y=True),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as matplotlib gives where axes have no room
        draw_panels(panels, "A title that says at length what the figure shows " * 3, tmp_path / "figure.png")
    picture = np.array(Image.open(tmp_path / "figure.png").convert("L"))
    edges = [picture[:, :3], picture[:, -3:], picture[:3], picture[-3:]]
    assert all((edge == 255).all() for edge in edges)  # nothing is cut
    band = np.array(Image.open(tmp_path / "figure.png").convert("RGB"))[:, picture.shape[1] // 2 :]
    grey = np.rint(0.85 * 255 + 0.15 * np.array([0x8A, 0x8A, 0x8A]))
    rows = ((np.abs(band - grey).max(2) <= 1).sum(1) > 50).nonzero()[0]
    axis = (band.max(2) < 60).sum(1).argmax()
    assert axis - rows.max() > 5  # the band ends at the smallest value, above the axis
