"""A checkpoint is a run's, or called damaged."""

from pathlib import Path

import pytest
import torch

from torch_emc2.checkpoint import load_checkpoint


def test_a_file_that_is_no_checkpoint_is_called_that(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save(dict.fromkeys(("pytorch-lightning_version", "epoch", "global_step", "state_dict"), 0), file)
    whole = file.read_bytes()
    assert load_checkpoint(file)["epoch"] == 0
    for content in (b"", b"notes", b"\x80\x02}q\x00.", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"last\.ckpt is damaged \(no checkpoint, or a part of one\): put another"):
            load_checkpoint(file)
    torch.save({"a": 1}, file)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged \(no checkpoint of a run\): put another"):
        load_checkpoint(file)
    with pytest.raises(ValueError, match=r"gone\.ckpt is damaged \(.*No such file"):
        load_checkpoint(tmp_path / "gone.ckpt")
