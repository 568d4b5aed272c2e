"""Files that are whole or not there, and what is said of one that is damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_checkpoint", "one_line", "whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; the file takes ``path``, or the place of what is there, when whole.

    Where ``path`` is a link, all that is said of it is said of the file that it leads to.

    Raises:
        OSError: it could not be written; what is there is kept.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is no file that could be written anew: give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:  # some file systems find out only now that they are full
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        failure = OSError(f"{path} was not written, what was there is kept: {error.strerror or error}")
        failure.errno = error.errno
        raise failure from error
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of a run, memory-mapped.

    Raises:
        ValueError: it is damaged, or none of ours.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not {"pytorch-lightning_version", "global_step", "state_dict"} <= checkpoint.keys():
            raise KeyError("no checkpoint of a run")
    except Exception as error:  # whatever unpickling makes of foreign bytes
        raise ValueError(
            f"{path} is damaged ({one_line(error)[:200]}): put another checkpoint in its place, "
            "or remove it to start again"
        ) from error
    return checkpoint


def one_line(error: BaseException) -> str:
    """Return an error as one line of text, to be quoted in another."""
    return " ".join(f"{type(error).__name__}: {error}".split())
