"""Files that are made once, under a hash of all that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock  # torch's own dependency

from torch_emc2.data.images import ImageDataset

__all__ = ["keep", "which"]

T = TypeVar("T")


def keep(
    folder: Path,
    origin: Mapping[str, Any],
    suffix: str,
    opened: Callable[[Path], T | None],
    made: Callable[[Path], T],
) -> T:
    """Open the file that depends on ``origin``, made first where the folder does not have it whole.

    Args:
        folder: where such files are kept.
        origin: what JSON can hold.
        suffix: of the file's name.
        opened: opens it; None where it is missing, cut short or damaged.
        made: makes it. Another process that makes the same is waited for.
    """
    file = folder / f"{hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]}{suffix}"
    if (found := opened(file)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        found = opened(file)
        return made(file) if found is None else found


def which(images: ImageDataset) -> str:
    """Hash which of the data set's images these are, and for images in files those files' paths, sizes and times."""
    digest = hashlib.sha256(images.rows.numpy().tobytes() + images.fingerprint.encode())
    for i in range(len(images)):
        if (path := images.path(i)) is not None:
            seen = f"{os.path.abspath(path)}\0"
            with contextlib.suppress(OSError):  # unreadable, as decoding it will find
                stat = os.stat(path)
                seen += f"{stat.st_size}\0{stat.st_mtime_ns}"
            digest.update(f"{seen}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
