"""What several tests start from."""

from pathlib import Path

import pytest

from torch_emc2.config import Config, read_config


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    """A run of two epochs of four batches on digits: a second or two."""
    overrides = "--data.limit 66 --data.augmentation.size 8 --batch_size 16 --epochs 2 --log_every_steps 1"
    config = read_config("quickstart", [*overrides.split(), "--accelerator", "cpu", "--emc2.burn_in", "0.1"])
    config.out = str(tmp_path / "run")
    return config
