"""A file is whole or the one before."""

import errno
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torch_emc2.files import whole_file


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "results.csv"
    with whole_file(target) as path:
        path.write_text("half")
        assert not target.exists()
        path.write_text("whole")
    assert target.read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), whole_file(target) as path:  # noqa: PT012
        path.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_full_disk_is_told_with_its_number(tmp_path: Path) -> None:
    target = tmp_path / "results.csv"
    with pytest.raises(OSError, match=rf"{target} was not written, .*: No space left") as raised, whole_file(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.errno == errno.ENOSPC


def test_an_error_of_another_file_is_that_file_s(tmp_path: Path) -> None:
    target = tmp_path / "results.csv"
    target.write_text("before")
    with pytest.raises(FileNotFoundError) as raised, whole_file(target):
        (tmp_path / "missing").read_text()
    assert raised.value.filename == str(tmp_path / "missing")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]
    with (
        pytest.raises(OSError, match=rf"{target} was not written, .*: No such file") as raised,
        whole_file(target) as own,
    ):
        own.unlink()
    assert raised.value.errno == errno.ENOENT


def test_a_link_is_followed_and_what_is_no_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with whole_file(tmp_path / "link") as path:
        path.write_text("whole")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "whole"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="is no file that could be written anew"), whole_file(tmp_path / name):
            pass
    assert (tmp_path / "pipe").is_fifo()


def test_two_writers_have_a_file_each_and_the_last_stands(tmp_path: Path) -> None:
    target = tmp_path / "results.csv"
    with whole_file(target) as one:
        one.write_text("of the first, ")
        with whole_file(target) as other:
            other.write_text("of the second")
        assert target.read_text() == "of the second"
        with one.open("a") as file:
            file.write("which is longer")
        assert target.read_text() == "of the second"
    assert target.read_text() == "of the first, which is longer"
    assert list(tmp_path.iterdir()) == [target]


def test_readers_beside_two_writers_see_whole_files(tmp_path: Path) -> None:
    target, size = tmp_path / "file", 1 << 18

    def write(letter: bytes) -> None:
        for _ in range(100):
            with whole_file(target) as path:
                path.write_bytes(letter * size)

    target.write_bytes(b"a" * size)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(letter,), daemon=True) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        content = target.read_bytes()
        assert content in (b"a" * size, b"b" * size)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_that_of_any_new_file_or_of_the_one_before(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        for name in ("text", "tensors"):
            for _ in range(2):
                with whole_file(tmp_path / name) as path:
                    if name == "text":
                        path.write_text("whole")
                    else:
                        save_file({"a": torch.zeros(2)}, path)  # which renames a file of mode 0600
                assert (tmp_path / name).stat().st_mode & 0o777 == mode
            (tmp_path / name).chmod(0o640)
            with whole_file(tmp_path / name) as path:
                path.write_text("anew")
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal
from torch_emc2.files import whole_file
with whole_file(pathlib.Path({str(tmp_path / "a[1].csv")!r})) as path:
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode < 0
    (left,) = tmp_path.iterdir()
    assert left.read_text() == "half"
    others = [
        f".a[1].csv.1234.{os.getpid()}@{socket.gethostname()}.partial",  # of one that lives
        f".a[1].csv.1234.{left.name.split('.')[-2].split('@')[0]}@elsewhere.partial",
        left.name.replace("a[1]", "b"),
    ]
    for name in others:
        (tmp_path / name).touch()
    with whole_file(tmp_path / "a[1].csv") as path:
        path.write_text("whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["a[1].csv", *others])
