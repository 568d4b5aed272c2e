"""Text in pictures: its width, and fonts for what matplotlib's own lacks."""

import itertools
from pathlib import Path

import pytest
import torch
from matplotlib import rc_context

from torch_emc2.runs import lettering
from torch_emc2.runs.lettering import _width, fitted, lettered, wrapped
from torch_emc2.runs.tiles import Tile, draw_rows


def test_a_long_name_keeps_its_beginning_and_its_end() -> None:
    name = "a photograph of the sea, taken in summer.jpeg"
    short = fitted(name, 1.2, 8)
    begin, end = short.split("…")
    assert name.startswith(begin)
    assert name.endswith(end)
    assert abs(len(begin) - len(end)) <= 1
    assert _width(short, 8) <= 1.2 < _width(f"{name[: len(begin) + 1]}…{end}", 8) + 0.1
    assert fitted("short.png", 1.2, 8) == "short.png"
    assert fitted("", 1.2, 8) == ""


def test_a_title_breaks_between_words() -> None:
    title = "Near duplicates, the first 12 of 43 groups; below: cosine similarity to the group's first, name"
    lines = wrapped(title, 3, 11).split("\n")
    assert len(lines) > 1
    assert " ".join(lines) == title
    assert all(_width(line, 11) <= 3 for line in lines)
    longer = [f"{line} {after.split()[0]}" for line, after in itertools.pairwise(lines)]
    assert all(_width(line, 11) > 3 for line in longer), "each as long as it can be"
    assert "…" in wrapped("x" * 200, 3, 11)


def test_what_a_font_lacks_is_written_in_another_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computer Modern has no Cyrillic, DejaVu has; both come with matplotlib."""
    monkeypatch.setattr(lettering, "_OTHERS", ("Not Installed", "DejaVu Sans"))
    computer_modern = {"font.family": "cmr10", "axes.formatter.use_mathtext": True}

    def drawn(name: str) -> bytes:
        out = tmp_path / "n.png"
        draw_rows([[Tile(torch.zeros(1, 8, 8, dtype=torch.uint8), [name])]], "", out)
        return out.read_bytes()

    with rc_context({"font.family": "DejaVu Sans"}):
        width = _width("Жук", 8)
    with rc_context(computer_modern):
        with lettered():
            assert _width("Жук", 8) == width
        assert drawn("Ж") != drawn("Ю")
        monkeypatch.setattr(lettering, "_OTHERS", ())
        assert drawn("Ж") == drawn("Ю"), "boxes"
