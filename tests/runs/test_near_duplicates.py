"""Groups of near duplicates, against a search by a plain loop."""

import csv
from pathlib import Path

import matplotlib.image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_emc2.runs import Duplicates, draw_duplicates, find_duplicates, write_duplicates
from torch_emc2.runs import duplicates as module
from torch_emc2.runs.duplicates import near_duplicates
from torch_emc2.runs.gallery import Gallery
from torch_emc2.runs.neighbours import Hit
from torch_emc2.runs.tiles import Tile


def by_loop(z: torch.Tensor, threshold: float) -> set[frozenset[int]]:
    near = torch.nn.functional.cosine_similarity(z[:, None].double(), z[None].double(), dim=2) >= threshold
    left, groups = set(range(len(z))), set()
    while left:
        group, new = set(), {left.pop()}
        while new:
            group |= new
            new = {j for i in new for j in range(len(z)) if near[i, j]} - group
        left -= group
        groups.add(frozenset(group))
    return {group for group in groups if len(group) > 1}


@given(st.integers(1, 40), st.integers(0, 2**16), st.sampled_from([0.3, 0.7, 0.9]), st.sampled_from([1, 7, 256]))
@settings(max_examples=40, deadline=None)
def test_groups_hang_together_by_pairs(size: int, seed: int, threshold: float, chunk: int) -> None:
    z = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        groups = near_duplicates(z, threshold)
    assert {frozenset(hit.row for hit in group) for group in groups} == by_loop(z, threshold)
    twice = near_duplicates(torch.cat([z, z]), 1.0)
    assert sorted([hit.row for hit in group] for group in twice) == [[i, i + size] for i in range(size)]
    least = [round(min(cosine for _, cosine in group), 6) for group in groups]
    assert least == sorted(least, reverse=True)  # the surest first
    for group in groups:
        first = z[group[0].row]
        expected = torch.nn.functional.cosine_similarity(z[[hit.row for hit in group]], first[None])
        assert [hit.similarity for hit in group] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_picture_and_a_paragraph_a_group(tmp_path: Path) -> None:
    z = torch.tensor([[1.0, 0], [0, 1], [1, 0.01], [0.01, 1], [1, 1]])
    image = torch.full((3, 4, 4), 200, dtype=torch.uint8)
    gallery = Gallery(z, list("abcde"), [None] * 5, lambda i: image)
    found = Duplicates(gallery, near_duplicates(z, 0.99))
    assert str(found) == " 1.000  a\n 1.000  c\n\n 1.000  b\n 1.000  d"
    assert not found.identical
    draw_duplicates(found, tmp_path / "d.png")
    picture = (matplotlib.image.imread(tmp_path / "d.png")[..., :3] * 255).round()
    assert (picture == 200).all(-1).sum() == pytest.approx(4 * 175**2, rel=0.05)


def test_identical_files_are_told_from_like_ones(tmp_path: Path) -> None:
    contents = {"a": b"one", "b": b"two", "c": b"one", "d": b"two", "e": b"three", "f": b"one"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in contents]
    pq.write_table(pa.table({"path": paths, "embedding": [[1.0, 0.0]] * 5 + [[0.0, 1.0]]}), tmp_path / "e.parquet")
    found = find_duplicates(tmp_path / "e.parquet", 0.99)
    assert found.identical == {2: 0, 3: 1}
    write_duplicates(found, tmp_path / "d.csv")
    with (tmp_path / "d.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [found.gallery.names[i] for i in range(5)]
    assert [row["identical"] for row in rows] == ["no", "no", "yes", "yes", "no"]
    assert {row["group"] for row in rows} == {"1"}
    assert {row["similarity"] for row in rows} == {"1.000000"}


def test_groups_with_identical_files_come_first(tmp_path: Path) -> None:
    contents = {"a": b"one", "b": b"two", "c": b"three", "d": b"four", "e": b"three"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in contents]
    rows = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.1, 0.99], [0.1, 0.99]]  # the first two are the most alike
    pq.write_table(pa.table({"path": paths, "embedding": rows}), tmp_path / "e.parquet")
    found = find_duplicates(tmp_path / "e.parquet", 0.99)
    assert [[hit.row for hit in group] for group in found.groups] == [[2, 3, 4], [0, 1]]
    assert found.identical == {4: 2}


def test_of_many_groups_and_images_the_first_thirty_are_listed() -> None:
    gallery = Gallery(torch.zeros(1, 2), [str(i) for i in range(99)], [None] * 99, lambda i: torch.zeros(1, 1, 1))
    pairs = [[Hit(2 * i, 1.0), Hit(2 * i + 1, 1.0)] for i in range(31)]
    *shown, more = str(Duplicates(gallery, pairs)).split("\n\n")
    assert (len(shown), more) == (30, "… and 1 more group, which a table by --csv has")
    *shown, more = str(Duplicates(gallery, [[Hit(i, 1.0) for i in range(40)]])).split("\n")
    assert (len(shown), more) == (30, "… and 10 more images, which a table by --csv has")


def test_a_link_is_no_copy(tmp_path: Path) -> None:
    """To delete what is identical must leave each image once."""
    (tmp_path / "z").write_bytes(b"one")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "b").hardlink_to(tmp_path / "z")
    (tmp_path / "c").write_bytes(b"one")
    paths = [str(tmp_path / name) for name in "azbzc"]
    pq.write_table(pa.table({"path": paths, "embedding": [[1.0, 0.0]] * 5}), tmp_path / "e.parquet")
    assert find_duplicates(tmp_path / "e.parquet", 0.99).identical == {4: 0}


def test_of_many_groups_the_most_and_the_least_alike_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        module, "draw_rows", lambda rows, title, out: drawn.extend([title, *(row[0].lines[1] for row in rows)])
    )
    angles = torch.arange(26, dtype=torch.float64).div(2, rounding_mode="floor") * 0.4
    angles[1::2] += torch.arange(13) * 0.005  # group i's two are i times as far apart
    z = torch.stack([angles.cos(), angles.sin()], 1)
    gallery = Gallery(z, [str(i) for i in range(26)], [None] * 26, lambda i: torch.zeros(3, 2, 2, dtype=torch.uint8))
    found = Duplicates(gallery, near_duplicates(z, 0.99))
    assert len(found.groups) == 13
    (tmp_path / "d.png").touch()
    draw_duplicates(found, tmp_path / "d.png")
    assert drawn[0].startswith("Near duplicates, the 6 most and the 6 least alike of 13 groups; below: cosine")
    assert drawn[1:] == [str(2 * i) for i in (*range(6), *range(7, 13))]


def test_a_group_that_is_too_long_for_its_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[Tile]] = []
    monkeypatch.setattr(module, "draw_rows", lambda rows, title, out: drawn.extend(rows))
    gallery = Gallery(torch.zeros(11, 2), [str(i) for i in range(11)], [None] * 11, lambda i: None)
    (tmp_path / "d.png").touch()
    draw_duplicates(Duplicates(gallery, [[Hit(i, 1.0) for i in range(11)]], {1: 0}), tmp_path / "d.png")
    (row,) = drawn
    assert [list(tile.lines) for tile in row[:2]] == [["1.000", "0"], ["identical", "1"]]
    assert [list(tile.lines)[2:] for tile in row] == [[]] * 7 + [["… and 3 more"]]
