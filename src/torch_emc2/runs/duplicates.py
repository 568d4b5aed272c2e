"""Images that are nearly the same."""

from __future__ import annotations

import os
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

__all__ = ["Duplicates", "draw_duplicates", "find_duplicates", "near_duplicates"]

_CHUNK = 256  # rows that are compared with all others at once
_ROUNDING = 1e-9  # the cosine of a row and itself may lack it
_DRAWN, _ABREAST = 12, 8


class Duplicates(NamedTuple):
    """Groups of near duplicates, the most alike first: of each image its similarity to the group's first."""

    gallery: Gallery
    groups: list[list[Hit]]

    def __str__(self) -> str:
        """A paragraph a group."""
        names = self.gallery.names
        return "\n\n".join("\n".join(f"{cosine:6.3f}  {names[i]}" for i, cosine in group) for group in self.groups)


def find_duplicates(source: Path, threshold: float) -> Duplicates:
    """Find groups of near duplicates in a table of embeddings, or among the images that a run was trained on.

    Two images are near duplicates if the cosine of their embeddings is at least ``threshold``; a group is what hangs
    together by such pairs, whose ends may be further apart.

    Raises:
        ValueError: the source is neither.
    """
    gallery = open_gallery(source)
    return Duplicates(gallery, near_duplicates(gallery.embeddings, threshold))


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


def draw_duplicates(found: Duplicates, out: Path) -> None:
    """Draw a group a row as a PNG, the first of many."""
    gallery, groups = found.gallery, found.groups
    refuse_images_name(out, gallery)
    rows = [
        [
            Tile(gallery.image(i), [f"{cosine:.3f}", os.path.basename(gallery.names[i])])
            for i, cosine in group[:_ABREAST]
        ]
        for group in groups[:_DRAWN]
    ]
    of = f"the first {_DRAWN} of {len(groups)} groups" if len(groups) > _DRAWN else f"{len(groups)} groups"
    with whole_file(out) as file:
        draw_rows(rows, f"Near duplicates, {of}; below: cosine similarity to the group's first, name", file)
