"""What a run leaves behind, to compare; and ways to stop one."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from torch_emc2.config import Config, to_yaml
from torch_emc2.training import run, train

Weights = dict[str, Tensor]
Outcome = tuple[Weights, Weights, Any, list[dict[str, str]]]


class Stop(Exception):
    """An interruption."""


class StopAfter(L.Callback):
    """Interrupts a run once it has taken some steps: what is done after the last checkpoint is lost."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.steps:
            raise Stop


def interrupt(config: Config, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        original = run.checkpoint_callbacks
        patch.setattr(run, "checkpoint_callbacks", lambda *args: [*original(*args), StopAfter(steps)])
        with pytest.raises(Stop):
            train(config)


def outcome(run: Path) -> Outcome:
    """Weights, the loss's memory, and the metrics."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return (
        load_file(run / "encoder.safetensors"),
        load_file(run / "head.safetensors"),
        {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("loss.")},
        rows,
    )


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got[:3], want[:3], rtol=0, atol=0)
    assert got[3] == want[3]


def break_inside(image: Path) -> None:
    """Change a byte in the middle of a PNG: its header and its end are whole, and so is its size."""
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 255
    image.write_bytes(content)


def photos(folder: Path, number: int) -> str:
    """Write a folder of noise, its image 7 unreadable, as only decoding finds; returns its name as a data set."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        pixels = torch.randint(256, (12, 12, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    break_inside(folder / "7.png")
    return f"folder:{folder}"


@contextlib.contextmanager
def started(
    config: Config, file: Path, until: Callable[[], bool], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start ``emc2 train`` on a config, written to ``file``, and give the process once ``until()`` holds."""
    file.write_text(to_yaml(config))
    with subprocess.Popen(
        [sys.executable, "-m", "torch_emc2", "train", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell's children ignore it
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not until():
                assert process.poll() is None, "the run ended before it could be stopped"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
