"""Tables and figures against means and spreads worked out by hand."""

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
