"""A folder has one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from torch_emc2.processes import is_running

__all__ = ["only_writer"]

# Who holds which folder here. The kernel's lock is the process's: a second hold would get it too, and its end lose it.
# A forked process has a copy of this, and none of the locks.
_held: dict[tuple[int, Path], str] = {}
_holding = threading.Lock()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the one that writes into a folder, which is made; where it is left empty, it goes again.

    The file ``.lock`` in it says whose it is. The lock on that file is the kernel's, and a record lock: it ends with
    its process however that ends, the loader's workers, which outlive a process that is killed, do not inherit it, and
    NFS has it too.

    Raises:
        BlockingIOError: another is at it, in this process or in one that the message names.
    """
    path = folder / ".lock"
    owner = f"process {os.getpid()} on {socket.gethostname()} since {_now()}"
    with _held_once(folder, owner):
        made = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
        try:
            file.truncate(0)
            file.write(f"{owner}\n")
            file.flush()
            yield
        finally:
            with suppress(OSError):
                path.unlink()  # while it is locked: whoever comes next has a file of its own
            file.close()
            with suppress(OSError):  # not empty
                for empty in made:
                    empty.rmdir()


@contextmanager
def _held_once(folder: Path, owner: str) -> Iterator[None]:
    """Refuse a folder that this process holds already; its lock's file is not touched."""
    key = os.getpid(), folder.resolve()
    with _holding:
        if (first := _held.setdefault(key, owner)) is not owner:
            raise _in_use(folder, first)
    try:
        yield
    finally:
        del _held[key]


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "seconds")


def _in_use(folder: Path, owner: str, unless: str = "") -> BlockingIOError:
    return BlockingIOError(f"{folder} is in use by {owner}{unless}: wait for it, or give another folder")


def _locked(path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip()
            taken = error.errno in (errno.EACCES, errno.EAGAIN)
            if taken or _may_be_at_it(owner):  # the latter where a file system has no locks
                file.close()
                unless = "" if taken else f" (remove {path} if it has ended)"
                raise _in_use(path.parent, owner or "another process", unless) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the one before removed it in the meantime


def _may_be_at_it(owner: str) -> bool:
    match = re.match(r"process (\d+) on (\S+)", owner)
    return match is not None and (match[2] != socket.gethostname() or is_running(int(match[1])))
