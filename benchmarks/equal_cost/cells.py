"""Cells: one training each; what is finished is kept, a line each."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Cell", "Kept", "Result"]

Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A training, and whether its test queries are looked at.

    Attributes:
        problem: name.
        method: name.
        batch_size: pairs in memory at a time.
        epochs: over the training pairs.
        lr: highest learning rate.
        temperature: 1 / β.
        kappa: the positive's mass; None for the method's own.
        seed: of weights, order and draws.
        final: test too; else validation alone.
    """

    problem: str
    method: str
    batch_size: int
    epochs: float
    lr: float
    temperature: float
    kappa: float | str | None = None
    seed: int = 0
    final: bool = False


class Kept:
    """A file of finished cells.

    Args:
        path: of JSON lines, which several processes may write; one that is not whole is as if it were not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[Cell, Result] = {}
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                kept = json.loads(line)
            except ValueError:  # its writer was killed
                continue
            self.results[Cell(**kept["cell"])] = kept["result"]

    def keep(self, cell: Cell, result: Result) -> None:
        """Append a finished cell; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")
            line = json.dumps({"cell": asdict(cell), "result": result}, ensure_ascii=False)
            file.write(b"\n" * torn + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[cell] = result
