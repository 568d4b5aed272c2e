"""What several tests start from."""

from pathlib import Path

import pytest

from torch_emc2.config import Config, read_config
from torch_emc2.training import train


def _tiny(out: Path) -> Config:
    overrides = "--data.limit 66 --data.augmentation.size 8 --batch_size 16 --epochs 2 --log_every_steps 1"
    config = read_config("quickstart", [*overrides.split(), "--accelerator", "cpu", "--emc2.burn_in", "0.1"])
    config.out = str(out)
    return config


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    """A run of two epochs of four batches on digits: a second or two."""
    return _tiny(tmp_path / "run")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, done; tests that only read it share it."""
    return train(_tiny(tmp_path_factory.mktemp("finished")))
