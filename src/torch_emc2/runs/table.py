"""A Parquet table of embeddings: a row an image, and which model they are of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from torch_emc2.error_text import one_line

__all__ = ["EmbeddingTable", "Origin", "read_table", "write_table"]

_KEY = b"torch_emc2"


@dataclass(frozen=True)
class Origin:
    """What a table's embeddings are of.

    Attributes:
        model: the hash of its weights, `Model.identity`.
        run: the folder that the run was in.
        normalized: rows have the length 1.
        value_range: of values deeper than 8 bits; None where there were none.
    """

    model: str
    run: str
    normalized: bool
    value_range: str | None = None


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings of images.

    Attributes:
        paths: n files.
        labels: n classes, the folders that hold the images; None for those that are in none.
        embeddings: float32 (n, d).
        origin: None where the table does not say.
        modified: n times, in ns since 1970, at which the files were last changed; None where the table does not say.
    """

    paths: Sequence[str]
    labels: Sequence[str | None]
    embeddings: Tensor
    origin: Origin | None
    modified: Sequence[int | None]


def write_table(table: EmbeddingTable, file: Path) -> None:
    """Write a table."""
    flat = pa.array(table.embeddings.flatten().numpy())
    columns = pa.table({
        "path": pa.array(table.paths, pa.string()),
        "label": pa.array(table.labels, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, table.embeddings.shape[1]),
        "modified": pa.array(table.modified, pa.int64()),
    })  # fmt: skip
    if table.origin is not None:
        columns = columns.replace_schema_metadata({_KEY: json.dumps(asdict(table.origin))})
    pq.write_table(columns, file)


def read_table(path: Path) -> EmbeddingTable:
    """Read a table; one that has no labels, or does not say what it is of, likewise.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a table of embeddings.
    """
    try:
        columns = pq.read_table(path)
        paths = columns["path"].to_pylist()
        labels, modified = (
            columns[name].to_pylist() if name in columns.column_names else [None] * len(paths)
            for name in ("label", "modified")
        )
        lists = columns["embedding"].combine_chunks()
        flat = torch.tensor(lists.flatten().to_numpy(), dtype=torch.float32)
        width = len(flat) // len(paths) if paths else getattr(lists.type, "list_size", 0)
        embeddings = flat.view(len(paths), width)
        known: dict[str, Any] | None = json.loads((columns.schema.metadata or {}).get(_KEY, "null"))
        origin = None if known is None else Origin(**known)
        return EmbeddingTable(paths, labels, embeddings, origin, modified)
    except FileNotFoundError:
        raise
    except Exception as error:  # pyarrow, json and torch each have their own for what does not fit
        raise ValueError(f"{str(path)!r} is damaged, or no table of emc2 embed ({one_line(error)})") from error
