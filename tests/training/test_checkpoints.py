"""A checkpoint is whole, or not there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from outcomes import Stop
from torch_emc2.training.checkpoints import WholeCheckpoints


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = WholeCheckpoints(), tmp_path / "checkpoints" / "last.ckpt"
    files.save_checkpoint({"step": 1}, path)

    def killed(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        assert Path(file.name).parent == path.parent  # on another file system the last step would be a copy
        raise Stop

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(Stop):
        files.save_checkpoint({"step": 2}, path)
    assert files.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert list(path.parent.iterdir()) == [path]
