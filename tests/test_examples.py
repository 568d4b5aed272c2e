"""Every example runs, in a few seconds each, and what it prints of itself is so."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


class Ran:
    """What an example has printed: the numbers after some words, each time."""

    def __init__(self, printed: str) -> None:
        self.printed = printed

    def numbers(self, words: str) -> list[float]:
        return [float(number) for number in re.findall(rf"{words}\D*?(-?\d+(?:\.\d+)?)", self.printed)]


class Here:
    """An empty folder to run in: in this process, which has imported all that is slow to import."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def run(self, example: str, *arguments: str) -> Ran:
        self.monkeypatch.setattr(sys, "argv", [example, *arguments])
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
        return Ran(self.capfd.readouterr().out)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(monkeypatch, capfd)


def assert_same(*states: dict[str, Any]) -> None:
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_plain_loop(here: Here) -> None:
    first = here.run("plain_loop", "--epochs", "1").numbers("other view found")
    again = here.run("plain_loop", "--epochs", "1").numbers("other view found")
    assert first[0] < first[1] == again[0] < again[1]
    assert torch.load("digits.pt")["loss"]["_extra_state"]["calls"] == 2 * (1797 // 128)
    here.run("plain_loop", "--epochs", "2", "--checkpoint", "whole.pt")
    assert_same(torch.load("digits.pt"), torch.load("whole.pt"))


def test_small_batches(here: Here) -> None:
    first = here.run("small_batches", "--epochs", "1").numbers("other view found")
    again = here.run("small_batches", "--epochs", "1").numbers("other view found")
    assert first[0] < first[1] == again[0] < again[1]
    saved = torch.load("small_batches.pt")
    assert saved["slow_encoder"]["n_averaged"] == 2 * (1797 // 8)
    assert len(saved["loss"]["_extra_state"]["ids"]) == 512
    here.run("small_batches", "--epochs", "2", "--checkpoint", "whole.pt")
    assert_same(saved, torch.load("whole.pt"))


def test_lightning_module(here: Here) -> None:
    ran = here.run("lightning_module", "--epochs", "2")
    assert ran.numbers("chains of")[0] > 1792  # an epoch's, and some of those that it left out
    assert ran.numbers("calls of the loss") == [28]
    assert ran.numbers(r"calls of the loss 28, then") == [42]


def test_lightly_simclr(here: Here) -> None:
    pytest.importorskip("lightly")
    few, more = (
        here.run("lightly_simclr", "--images", "192", "--epochs", epochs).numbers("global loss") for epochs in "14"
    )
    assert more[0] < few[0]


def test_two_processes(here: Here) -> None:
    command = [sys.executable, EXAMPLES / "two_processes.py", "--epochs", "2"]
    ran = Ran(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert ran.numbers("chains of")[0] > 1792
    assert "on each of 2 ranks, alike: True" in ran.printed
    assert ran.numbers("epoch 1: global loss") < ran.numbers("epoch 0: global loss")


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_loop(processes: int, here: Here) -> None:
    pytest.importorskip("accelerate")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, EXAMPLES / "accelerate_loop.py", "--epochs", "2"]
    ran = Ran(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    first, whole, resumed = ran.numbers(rf"{processes} processes: global loss")
    assert resumed == whole < first
    assert "weights equal True, chains equal True" in ran.printed


def test_sentence_transformers_trainer(here: Here) -> None:
    for module in ("sentence_transformers", "datasets", "accelerate"):
        pytest.importorskip(module)
    ran = here.run("sentence_transformers_trainer", "--steps", "20")
    before, (after, resumed) = ran.numbers("test queries:"), ran.numbers(r"(?m:^)(?=\d.* after 20 steps)")
    assert before[0] == before[1] < after == resumed
    assert "stopped and resumed: the same weights and chains, bit for bit" in ran.printed


@pytest.mark.parametrize("processes", [1, 2])
def test_open_clip_training(processes: int, here: Here) -> None:
    pytest.importorskip("open_clip")
    torchrun = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, EXAMPLES / "open_clip_training.py", "--steps", "40"]
    ran = Ran(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (before,), (after,) = ran.numbers(r"(?m:^)(?=.* at first)"), ran.numbers(r"(?m:^)(?=.* after 40 steps)")
    assert before < 2 < 3 < after
    assert f"in {processes} process(es)" in ran.printed


def test_none_is_left_out() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {file.stem for file in EXAMPLES.glob("*.py")} <= tests
