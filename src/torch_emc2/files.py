"""Files that are whole or not there, and how to say what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["one_line", "whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; the file takes ``path``, or the place of what is there, when whole.

    Raises:
        OSError: it could not be written; what is there is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:  # some file systems find out only now that they are full
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        failure = OSError(f"{path} was not written, what was there is kept: {error.strerror or error}")
        failure.errno = error.errno
        raise failure from error
    finally:
        partial.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """Return an error as one line of text, to be quoted in another."""
    return " ".join(f"{type(error).__name__}: {error}".split())
