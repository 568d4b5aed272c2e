"""A folder has one writer, however the one before ended."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from torch_emc2.locks import only_writer


@contextmanager
def another_at(folder: Path, workers: int = 0) -> Iterator[int]:
    """Give the id of a process that holds a folder, and has forked workers that outlive it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        with only_writer(folder):
            for _ in range(workers):
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
            os.write(write, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    try:
        yield pid
    finally:
        os.killpg(pid, signal.SIGKILL)
        if not workers:
            os.waitpid(pid, 0)
        os.close(read), os.close(write)


def test_the_second_is_refused_with_the_firsts_name(tmp_path: Path) -> None:
    with another_at(tmp_path / "run") as pid:
        words = rf"run is in use by process {pid} on {re.escape(socket.gethostname())} since 2.*: wait for it"
        for _ in range(2):
            with pytest.raises(BlockingIOError, match=words), only_writer(tmp_path / "run"):
                pass
    with only_writer(tmp_path / "run"):  # which is killed
        assert f"process {os.getpid()} on" in (tmp_path / "run" / ".lock").read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_second_in_a_process_is_refused_and_the_first_holds_on(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    words = rf"is in use by process {os.getpid()} on {re.escape(socket.gethostname())} since 2.*: wait for it"
    refused: list[str] = []

    def enter(folder: Path) -> None:
        try:
            with only_writer(folder):
                pass
        except BlockingIOError as error:
            refused.append(str(error))

    with only_writer(tmp_path / "run"):
        enter(tmp_path / "run")
        enter(tmp_path / "link")
        thread = threading.Thread(target=enter, args=[tmp_path / "run"])
        thread.start()
        thread.join()
        assert [bool(re.search(words, message)) for message in refused] == [True] * 3
        in_another = "from pathlib import Path; from torch_emc2.locks import only_writer; import sys\n"
        in_another += "with only_writer(Path(sys.argv[1])): pass"
        other = subprocess.run(
            [sys.executable, "-c", in_another, str(tmp_path / "run")], capture_output=True, text=True, timeout=60
        )
        assert re.search(rf"BlockingIOError: .*{words}", other.stderr)
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "run"):
        pass


def test_a_killed_ones_workers_hold_nothing(tmp_path: Path) -> None:
    with another_at(tmp_path / "run", workers=2) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.killpg(pid, 0)  # the workers are there
        with only_writer(tmp_path / "run"):
            pass


def test_what_is_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), only_writer(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_whoever_gets_the_lock_of_a_removed_file_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, tries = fcntl.lockf, []

    def late(file: Any, how: int) -> None:
        if not tries:
            (tmp_path / ".lock").unlink()  # the one before ends between this one's opening and locking
        tries.append(1)
        lock(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with only_writer(tmp_path):
        assert len(tries) == 2
        assert (tmp_path / ".lock").exists()


def test_without_locks_the_name_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    here = socket.gethostname()
    for pid, host, free in ((gone, here, True), (os.getpid(), here, False), (gone, "elsewhere", False)):
        (tmp_path / ".lock").write_text(f"process {pid} on {host} since today\n")
        if free:
            with only_writer(tmp_path):
                assert f"process {os.getpid()} on {here}" in (tmp_path / ".lock").read_text()
        else:
            words = rf"in use by process {pid} on {host} since today \(remove .*\.lock if it has ended\)"
            with pytest.raises(BlockingIOError, match=words), only_writer(tmp_path):
                pass
