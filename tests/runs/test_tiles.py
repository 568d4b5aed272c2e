"""Pictures of images in rows: their colours, frames and captions."""

import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from torch_emc2.runs.lettering import wrapped
from torch_emc2.runs.tiles import PLAIN, Tile, draw_rows, thumbnail

GREEN = "#2e9e5b"


def pixels_of(path: Path, colour: str) -> int:
    """How many pixels of the picture have a colour such as "#2e9e5b"."""
    picture = (matplotlib.image.imread(path)[..., :3] * 255).round()
    return int((picture == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum())


def test_colours_of_images_and_frames_are_kept(tmp_path: Path) -> None:
    red = torch.tensor([200, 10, 30], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    grey = torch.full((1, 4, 4), 77, dtype=torch.uint8)
    out = tmp_path / "n.png"
    draw_rows([[Tile(red, ["a"]), Tile(grey, ["b"], GREEN), Tile(None, ["c"], GREEN)]], "Title", out, first=1)
    assert pixels_of(out, "#c80a1e") > 20_000
    assert pixels_of(out, "#4d4d4d") > 20_000
    assert pixels_of(out, GREEN) / pixels_of(out, PLAIN) == pytest.approx(2, rel=0.15)  # "no image" is grey too


def test_images_of_all_sizes_and_channels_stand_side_by_side(tmp_path: Path) -> None:
    images = [torch.zeros(c, h, w, dtype=torch.uint8) for c, h, w in ((1, 1, 1), (3, 5, 90), (1, 60, 2), (3, 8, 8))]
    draw_rows([[Tile(image, ["x"]) for image in images]] * 2, "", tmp_path / "n.png")
    height = 0.46 + 2 * (1.2 + 0.06 + 0.15 + 0.14)  # inches: the header, and of each row image, caption, space
    width = 2 * 0.12 + 4 * 1.2 + 3 * 0.14
    assert matplotlib.image.imread(tmp_path / "n.png").shape[:2] == pytest.approx((150 * height, 150 * width), abs=1)


def test_captions_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Names of files may hold anything: no mathematics, no new lines, no script that the font must have."""

    def drawn(name: str) -> tuple[int, bytes]:
        image = torch.zeros(1, 8, 8, dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_rows([[Tile(image, [name], GREEN)] * 3], name, tmp_path / "n.png", legend={"same": GREEN})
        return pixels_of(tmp_path / "n.png", GREEN), (tmp_path / "n.png").read_bytes()

    frames, plain = drawn("plain")
    for name in ("$x_$", "a\nb\nc\nd\ne", "猫", "\udcff", "x" * 3000):
        found, picture = drawn(name)
        assert found == frames  # the caption is one line, and leaves the image its place
        assert picture != plain


def test_thumbnails_are_means_of_squares() -> None:
    image = torch.randint(256, (3, 300, 511), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(thumbnail(image), image)
    large = image[:, :200, :256].repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    assert torch.equal(thumbnail(large), image[:, :200, :256])
    assert thumbnail(image[:, :1].repeat(1, 1, 20)).shape == (3, 1, 262)


def test_rows_need_not_be_equally_long(tmp_path: Path) -> None:
    image = torch.full((3, 4, 4), 200, dtype=torch.uint8)
    draw_rows([[Tile(image, ["a"])] * 3, [Tile(image, ["a", "b"])]], "", tmp_path / "n.png")
    picture = np.asarray(matplotlib.image.imread(tmp_path / "n.png"))
    assert picture.shape[1] == 750  # no narrower than a title
    assert pixels_of(tmp_path / "n.png", "#c8c8c8") > 4 * 20_000


def test_a_title_of_several_lines_makes_room(tmp_path: Path) -> None:
    title = "Near duplicates, the first 12 of 43 groups; below: cosine similarity to the group's first, name"
    tile, out = Tile(torch.zeros(1, 4, 4, dtype=torch.uint8), ["x"]), tmp_path / "n.png"
    draw_rows([[tile]], title, out)
    more = 0.2 * wrapped(title, 5 - 2 * 0.12, 11).count("\n")
    height = 0.46 + more + 1.2 + 0.06 + 0.15 + 0.14
    assert more > 0
    assert matplotlib.image.imread(out).shape[0] == pytest.approx(150 * height, abs=1)


def test_a_legend_comes_below_all_lines_of_a_title(tmp_path: Path) -> None:
    tile = Tile(torch.zeros(1, 4, 4, dtype=torch.uint8), ["x"])
    tops = []
    for title in ("short", "a title of many words " * 6):
        draw_rows([[tile]], title, tmp_path / "n.png", legend={"a frame": GREEN})
        picture = (matplotlib.image.imread(tmp_path / "n.png")[..., :3] * 255).round()
        green = (picture == [int(GREEN[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
        tops.append(int(green.any(1).argmax()))
    more = wrapped("a title of many words " * 6, 5 - 2 * 0.12, 11).count("\n")
    assert more > 0
    assert tops[1] - tops[0] == pytest.approx(150 * 0.2 * more, abs=1)
