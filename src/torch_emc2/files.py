"""Files that are whole or not there, and what is said of one that is damaged."""

from __future__ import annotations

import glob
import os
import secrets
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import Any

__all__ = ["cause", "is_running", "load_checkpoint", "one_line", "whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give an empty file beside ``path`` to write; it takes ``path``, or the place of what is there, when whole.

    Writers at the same time do not disturb one another: the last to finish wins. A file that is replaced keeps its
    permissions, and a new one gets those of any new file, also where a library puts its own file in the given one's
    place. Where ``path`` is a link, the file that it leads to is replaced.

    Raises:
        OSError: it could not be written; what is there is kept. One that names another file goes through as it is.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is no file that could be written anew: give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(target)
    writer = f"{os.getpid()}@{socket.gethostname()}"
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{writer}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = S_IMODE((target if target.exists() else partial).stat().st_mode)
        yield partial
        with partial.open("rb+") as file:  # some file systems find out only now that they are full
            os.fsync(file.fileno())
        if S_IMODE(partial.stat().st_mode) != mode:
            partial.chmod(mode)
        os.replace(partial, target)
    except OSError as error:
        if error.filename is not None and error.filename not in (str(partial), str(target)):
            raise
        failure = OSError(f"{path} was not written, what was there is kept: {error.strerror or error}")
        failure.errno = error.errno
        raise failure from error
    finally:
        partial.unlink(missing_ok=True)


def _remove_left_over(target: Path) -> None:
    """Remove what writers left that were killed on this host; of those on others nothing is known."""
    end = f"@{socket.gethostname()}.partial"
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{glob.escape(end)}"):
        pid = left.name.removesuffix(end).rpartition(".")[2]
        if pid.isdecimal() and not is_running(int(pid)):
            with suppress(OSError):  # another user's, or one that another writer has removed
                left.unlink()


def is_running(pid: int) -> bool:
    """Tell whether this host has a process of that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of a run, memory-mapped.

    Raises:
        ValueError: it is damaged, or none of ours.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):  # torch would advise to save it in another way
                raise ValueError("no checkpoint, or a part of one")
        import torch  # which nothing else here needs, nor the command while its arguments are wrong

        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if (
            not isinstance(checkpoint, dict)
            or not {"pytorch-lightning_version", "epoch", "global_step", "state_dict"} <= checkpoint.keys()
        ):
            raise ValueError("no checkpoint of a run")
    except Exception as error:  # whatever unpickling makes of foreign bytes
        raise ValueError(
            f"{path} is damaged ({cause(error)[:200]}): put another checkpoint in its place, "
            "or remove it to go on from the newest that is left"
        ) from error
    return checkpoint


def cause(error: BaseException) -> str:
    """Return an error's own words as one line, without the traceback that a loader's worker puts before them."""
    text = str(error).strip() or repr(error)
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())


def one_line(error: BaseException) -> str:
    """Return an error as one line of text, to be quoted in another."""
    return " ".join(f"{type(error).__name__}: {error}".split())
