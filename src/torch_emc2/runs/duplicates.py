"""Images that are nearly the same."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn.functional import normalize

from torch_emc2.files import whole_file
from torch_emc2.runs.gallery import Gallery, open_gallery, refuse_images_name
from torch_emc2.runs.neighbours import Hit
from torch_emc2.runs.tiles import Tile, draw_rows

__all__ = ["Duplicates", "draw_duplicates", "find_duplicates", "near_duplicates", "write_duplicates"]

_CHUNK = 256  # rows that are compared with all others at once
_ROUNDING = 1e-9  # the cosine of a row and itself may lack it
_DRAWN, _ABREAST = 6, 8
_LISTED = 30  # groups, and images of each


class Duplicates(NamedTuple):
    """Groups of near duplicates.

    Attributes:
        gallery: the images.
        groups: those with identical files first, then the most alike; of each image its similarity to the group's
            first.
        identical: of images whose file is a copy, byte for byte, of one before it in its group, that one.
    """

    gallery: Gallery
    groups: list[list[Hit]]
    identical: Mapping[int, int] = {}

    def __str__(self) -> str:
        """A paragraph a group; of many, the first of them."""
        shown = ["\n".join(_first(list(map(self._line, group)), "image")) for group in self.groups]
        return "\n\n".join(_first(shown, "group"))

    def _line(self, hit: Hit) -> str:
        same = f"  identical to {self.gallery.names[self.identical[hit.row]]}" if hit.row in self.identical else ""
        return f"{hit.similarity:6.3f}  {self.gallery.names[hit.row]}{same}"


def find_duplicates(source: Path, threshold: float) -> Duplicates:
    """Find groups of near duplicates in a table of embeddings, or among the images that a run was trained on.

    Two images are near duplicates if the cosine of their embeddings is at least ``threshold``; a group is what hangs
    together by such pairs, whose ends may be further apart.

    Raises:
        ValueError: the source is neither.
    """
    gallery = open_gallery(source)
    groups = near_duplicates(gallery.embeddings, threshold)
    copies = [dict(_identical([hit.row for hit in group], gallery.names)) for group in groups]
    order = sorted(range(len(groups)), key=lambda place: not copies[place])  # the others stay as they are
    return Duplicates(gallery, [groups[place] for place in order], dict(ChainMap(*copies)))


def _identical(rows: Sequence[int], names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield images whose file is a copy of one before, and that one; a link, or the same file twice, is no copy."""
    stats = {row: os.stat(names[row]) for row in rows if os.path.isfile(names[row])}
    sizes = Counter(stat.st_size for stat in stats.values())
    files: set[tuple[int, int]] = set()
    contents: dict[bytes, int] = {}
    for row, stat in stats.items():
        if sizes[stat.st_size] < 2 or (stat.st_dev, stat.st_ino) in files:
            continue
        files.add((stat.st_dev, stat.st_ino))
        with open(names[row], "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        if (first := contents.setdefault(content, row)) != row:
            yield row, first


def write_duplicates(found: Duplicates, out: Path) -> None:
    """Write a CSV, a line an image: its group's number, its similarity to the first, whether identical, its file."""
    with whole_file(out) as path, path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "similarity", "identical", "path"])
        for number, group in enumerate(found.groups, 1):
            for row, cosine in group:
                same = "yes" if row in found.identical else "no"
                writer.writerow([number, f"{cosine:.6f}", same, found.gallery.names[row]])


def near_duplicates(embeddings: Tensor, threshold: float) -> list[list[Hit]]:
    """Return the rows (n, d) that hang together by cosines of at least ``threshold``, groups of two and more."""
    unit = normalize(embeddings.double(), dim=1)
    rows = np.arange(len(unit))
    first = rows  # of each row's group
    for start, chunk in zip(range(0, len(unit), _CHUNK), torch.split(unit, _CHUNK), strict=True):
        one, other = (chunk @ unit.T >= threshold - _ROUNDING).nonzero(as_tuple=True)
        ends = np.concatenate([one.numpy() + start, rows]), np.concatenate([other.numpy(), first])
        graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(len(unit), len(unit)))
        group = connected_components(graph, directed=False)[1]
        first = np.unique(group, return_index=True)[1][group]
    members: dict[int, list[int]] = {}
    for row, own in enumerate(first.tolist()):
        members.setdefault(own, []).append(row)
    groups = [
        [Hit(i, cosine) for i, cosine in zip(group, (unit[group] @ unit[group[0]]).tolist(), strict=True)]
        for group in members.values()
        if len(group) > 1
    ]
    return sorted(groups, key=lambda group: (-round(min(cosine for _, cosine in group), 6), -len(group)))


def _first(lines: list[str], what: str) -> list[str]:
    if (more := len(lines) - _LISTED) <= 0:
        return lines
    return [*lines[:_LISTED], f"… and {more} more {what}{'s' * (more > 1)}, which a table by --csv has"]


def draw_duplicates(found: Duplicates, out: Path) -> None:
    """Draw a group a row as a PNG; of many the most and the least alike, of which a threshold has to be judged."""
    gallery, groups = found.gallery, found.groups
    refuse_images_name(out, gallery)
    drawn, which = groups, "1 group" if len(groups) == 1 else f"{len(groups)} groups"
    if len(groups) > 2 * _DRAWN:
        drawn = [*groups[:_DRAWN], *groups[-_DRAWN:]]
        which = f"the {_DRAWN} most and the {_DRAWN} least alike of {len(groups)} groups"
    folders = len({os.path.dirname(gallery.names[hit.row]) for group in drawn for hit in group[:_ABREAST]}) > 1
    rows = []
    for group in drawn:
        tiles = []
        for row, cosine in group[:_ABREAST]:
            folder, name = os.path.split(gallery.names[row])
            said = "identical" if row in found.identical else f"{cosine:.3f}"
            tiles.append(Tile(gallery.image(row), [said, folder, name] if folders else [said, name]))
        if (more := len(group) - _ABREAST) > 0:
            tiles[-1] = tiles[-1]._replace(lines=[*tiles[-1].lines, f"… and {more} more"])
        rows.append(tiles)
    below = "cosine similarity to the group's first, or identical to one before it; " + (
        "folder and name" if folders else "name"
    )
    with whole_file(out) as file:
        draw_rows(rows, f"Near duplicates, {which}; below: {below}", file)
