"""What several tests start from."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # what is compiled for one is interpreted, if it is told before it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

from outcomes import Outcome, outcome
from torch_emc2.config import Config, read_config, to_yaml
from torch_emc2.training import train

# Tests are small: threads would only wait for one another, and a fork leaves them behind. So for what tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def _tiny(out: Path) -> Config:
    overrides = "--data.limit 66 --data.augmentation.size 8 --batch_size 16 --epochs 2 --log_every_steps 1"
    config = read_config(
        "quickstart",
        [*overrides.split(), "--accelerator", "cpu", "--emc2.kernel", "metropolis", "--emc2.burn_in", "0.1"],
    )
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


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Outcome]:
    """Give the outcome of the same run in one go; tests that differ in how a run is stopped share it."""
    known: dict[str, Outcome] = {}

    def look_up(config: Config) -> Outcome:
        plain = replace(config, checkpoint_every_steps=None, data=replace(config.data, num_workers=0), out="")
        key = to_yaml(plain)
        if key not in known:
            known[key] = outcome(train(replace(plain, out=str(tmp_path_factory.mktemp("whole")))))
        return known[key]

    return look_up
