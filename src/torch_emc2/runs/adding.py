"""A table of embeddings that rows are added to: which rows it keeps, and which are another's or of another time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from torch_emc2.runs.table import EmbeddingTable, Origin, read_table

__all__ = ["NO_ROWS", "absolute", "joined", "last_change", "one_range", "rows_there", "up_to_date"]

NO_ROWS = EmbeddingTable([], [], torch.empty(0), None, [])


def rows_there(out: Path, own: Origin) -> EmbeddingTable:
    """Read a table that rows of a run's model are to be added to, and make its paths absolute."""
    table = read_table(out)
    _require_same(table.origin, own, out)
    relative = [path for path in table.paths if not os.path.isabs(path)]
    if relative and not any(map(os.path.exists, relative)):
        raise ValueError(f"the paths of {out} count from another folder ({relative[0]}, …): add to it from there")
    return replace(table, paths=list(map(absolute, table.paths)))


def _require_same(there: Origin | None, own: Origin, out: Path) -> None:
    """Raise ValueError where rows of a run's model do not belong into a table."""
    other = "another name, or remove it to write it anew"
    if there is None:
        raise ValueError(f"{out} does not say which model it is of: give {other}")
    if there.model != own.model:
        before = " before its further training" if Path(there.run).resolve() == Path(own.run).resolve() else ""
        raise ValueError(f"{out} is of another model, that of {there.run}{before}: give {other}")
    if there.normalized != own.normalized:
        option = "add --normalize" if there.normalized else "leave out --normalize"
        raise ValueError(
            f"the rows of {out} are {'' if there.normalized else 'not '}normalised: {option}, or give {other}"
        )


def absolute(path: str) -> str:
    """A file's path from everywhere; of links those are followed that lead to its folder, not the file's own."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def one_range(there: Origin, own: Origin, out: Path) -> str | None:
    """Return the range that old and new rows have in common."""
    if None not in (there.value_range, own.value_range) and there.value_range != own.value_range:
        raise ValueError(
            f"the rows of {out} are of the value range {there.value_range}, not {own.value_range}: "
            f"--value-range={there.value_range} gives it"
        )
    return there.value_range or own.value_range


def up_to_date(path: str, known: Mapping[str, int | None]) -> bool:
    """Tell whether a table has a file as it is: by the real path, and the time of its last change, if that is known."""
    real = os.path.realpath(path)
    return real in known and known[real] in (None, last_change(path))


def last_change(path: str) -> int | None:
    """When a file was last changed, in ns; None where that cannot be told."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:  # as reading it will find
        return None


def joined(first: EmbeddingTable, second: EmbeddingTable, anew: Sequence[str]) -> EmbeddingTable:
    """Return the rows of both, but those of the first that are of files looked at anew."""
    gone = set(map(os.path.realpath, anew))
    kept = [row for row, path in enumerate(first.paths) if os.path.realpath(path) not in gone]
    return EmbeddingTable(
        [*(first.paths[row] for row in kept), *second.paths],
        [*(first.labels[row] for row in kept), *second.labels],
        torch.cat([first.embeddings[kept], second.embeddings]),
        second.origin,
        [*(first.modified[row] for row in kept), *second.modified],
    )
