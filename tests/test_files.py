"""A file is whole or the one before."""

import errno
import os
from pathlib import Path

import pytest

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
