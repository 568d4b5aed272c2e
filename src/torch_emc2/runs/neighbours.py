"""The images nearest to given ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch_emc2.evaluation import nearest_neighbours
from torch_emc2.files import whole_file
from torch_emc2.runs.gallery import Gallery, of_images, of_run, of_table, refuse_images_name
from torch_emc2.runs.model import Model
from torch_emc2.runs.table import EmbeddingTable, read_table
from torch_emc2.runs.tiles import PLAIN, Tile, draw_rows

__all__ = ["Hit", "Neighbours", "draw_neighbours", "find_neighbours", "nearest_in"]

SAME, OTHER = "#2e9e5b", "#d1453b"

_DRAWN = 50  # queries


class Hit(NamedTuple):
    """An image that was found, by its row, and the cosine of its embedding and the query's."""

    row: int
    similarity: float


class Neighbours(NamedTuple):
    """Queries, and of each the nearest in a gallery, nearest first."""

    queries: Gallery
    gallery: Gallery
    hits: list[list[Hit]]

    def __str__(self) -> str:
        """A line a query, and below it a line a neighbour: similarity, class, name."""
        lines = []
        for query, hits in zip(self.queries.names, self.hits, strict=True):
            lines.append(query)
            for index, similarity in hits:
                label = self.gallery.labels[index]
                lines.append(f"  {similarity:6.3f}  {'' if label is None else f'{label}  '}{self.gallery.names[index]}")
        return "\n".join(lines)


def find_neighbours(
    run: Path, queries: Sequence[Path], table: Path | None = None, k: int = 8, *, value_range: str | None = None
) -> Neighbours:
    """Find the k images nearest to each query, by the cosine of a run's embeddings; exactly.

    Args:
        run: the run's folder.
        queries: images, and folders of some.
        table: where to look, as `embed_images` writes it; by default among the images that the run was trained on.
        k: how many. A query that is there itself does not count.
        value_range: of queries' values deeper than 8 bits; by default the table's, or the run's.

    Raises:
        ValueError: the folder is no finished run, or the table is another model's.
        DataError: a query is no image.
    """
    rows = None if table is None else read_table(table)
    known = rows.origin.value_range if rows is not None and rows.origin is not None else None
    model = Model(run, value_range=value_range or known)
    gallery = of_run(model) if rows is None or table is None else _own_table(model, rows, table)
    asked = model.images(list(queries))
    found = of_images(asked, model.features(asked), "query")
    return nearest_in(gallery, found, k)


def nearest_in(gallery: Gallery, queries: Gallery, k: int) -> Neighbours:
    """Find of each query the k nearest images of a gallery, itself left out."""
    searched = min(k + 1, len(gallery))
    indices, distances = nearest_neighbours(gallery.embeddings, queries.embeddings, searched, "cosine")
    hits = []
    for name, row, apart in zip(queries.names, indices.tolist(), distances.tolist(), strict=True):
        others = [Hit(i, 1 - d) for i, d in zip(row, apart, strict=True) if not _same_file(name, gallery.names[i])]
        hits.append(others[:k])
    return Neighbours(queries, gallery, hits)


def draw_neighbours(found: Neighbours, out: Path, title: str = "Queries, and the images nearest to them") -> None:
    """Draw each query at the left of a row and its neighbours to the right, as a PNG; the first of many."""
    queries, gallery, rows = found.queries, found.gallery, []
    refuse_images_name(out, queries, gallery)
    for i, hits in list(enumerate(found.hits))[:_DRAWN]:
        own = queries.labels[i]
        name = os.path.basename(queries.names[i])
        row = [Tile(queries.image(i), ["query", name] if own is None else ["query", own, name])]
        for index, similarity in hits:
            label = gallery.labels[index]
            frame = PLAIN if own is None or label is None else SAME if own == label else OTHER
            name = os.path.basename(gallery.names[index])
            lines = [f"{similarity:.3f}", name] if label is None else [f"{similarity:.3f}", label, name]
            row.append(Tile(gallery.image(index), lines, frame))
        rows.append(row)
    frames = {tile.frame for row in rows for tile in row}
    words = {"frame: the query's class": SAME, "another class": OTHER}
    legend = {text: colour for text, colour in words.items() if frames & {SAME, OTHER}}
    if len(found.hits) > _DRAWN:
        title = f"{title} (the first {_DRAWN} of {len(found.hits)})"
    classes = any(label is not None for label in [*queries.labels, *gallery.labels])
    below = "cosine similarity, class, name" if classes else "cosine similarity, name"
    with whole_file(out) as file:
        draw_rows(rows, f"{title}; below: {below}", file, legend=legend, first=1)


def _own_table(model: Model, table: EmbeddingTable, path: Path) -> Gallery:
    if table.origin is None or table.origin.model != model.identity:
        of = "does not say which model it is of" if table.origin is None else f"is that of {table.origin.run}"
        if table.origin is not None and Path(table.origin.run).resolve() == model.run.resolve():
            of += " before its further training"
        raise ValueError(f"{path} {of}, not of {model.run}: emc2 embed {model.run} FOLDER -o ANOTHER.parquet makes one")
    return of_table(table, path)


def _same_file(one: str, other: str) -> bool:
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))
