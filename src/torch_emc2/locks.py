"""A folder has one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from torch_emc2.files import is_running

__all__ = ["only_writer"]


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the one process that writes into a folder, which is made; where it is left empty, it goes again.

    The file ``.lock`` in it says whose it is. The lock on that file is the kernel's, and a record lock: it ends with
    its process however that ends, the loader's workers, which outlive a process that is killed, do not inherit it, and
    NFS has it too.

    Raises:
        BlockingIOError: another process is at it; the message names it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    file = _locked(path)
    try:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is locked: whoever comes next has a file of its own
        file.close()
        with suppress(OSError):  # not empty
            for empty in made:
                empty.rmdir()


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
                raise BlockingIOError(
                    f"{path.parent} is in use by {owner or 'another process'}{unless}: wait for it, "
                    "or give another folder"
                ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the one before removed it in the meantime


def _may_be_at_it(owner: str) -> bool:
    match = re.match(r"process (\d+) on (\S+)", owner)
    return match is not None and (match[2] != socket.gethostname() or is_running(int(match[1])))
