"""Files that are whole or not there."""

from __future__ import annotations

import glob
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE

from torch_emc2.processes import is_running

__all__ = ["whole_file"]


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
