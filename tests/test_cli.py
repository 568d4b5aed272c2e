"""The command: what it prints, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torch_emc2.cli import main
from torch_emc2.config import Config, presets, read_config, to_yaml

TINY = [
    "--data.augmentation.size",
    "8",
    "--data.limit",
    "66",
    "--batch_size",
    "16",
    "--epochs",
    "1",
    "--accelerator",
    "cpu",
]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["emc2", *argv])
    assert main() == 0
    assert capsys.readouterr().out.startswith("usage: emc2 COMMAND")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["learn"], "no command 'learn'"),
        (["train", "nothing"], "'nothing' is neither a preset"),
        (["train", "quickstart", "--lss", "x"], "--lss"),
        (["train", "quickstart", "--loss", "x"], "loss"),
        (["train", "quickstart", "--data.name", "folder:nowhere"], "'nowhere' is not a folder"),
        (["train", "quickstart", "--model.backbone", "resnet_18"], "resnet18"),
        (["train", "quickstart", "--accelerator", "abacus"], "abacus"),
        (["train", "quickstart", "--data.limit", "5"], "5 samples do not fill one global batch of 64"),
        (["evaluate", "nowhere"], "not a run's folder"),
        (["embed", "nowhere", "photos", "-o", "out.parquet"], "not a run's folder"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("emc2: error: ")
    assert message in line
    assert not (tmp_path / "runs").exists()  # nothing is in the way of another try


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(presets())


def test_a_preset_is_printed_as_yaml_to_start_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["presets", "stl10-b32"]) == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    assert read_config(str(tmp_path / "my.yaml")) == read_config("stl10-b32")
    assert main(["presets", "nothing"]) == 2


def test_help_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for field in ("--loss", "--emc2.num_chains", "--data.augmentation.crop_scale", "--optimizer.warmup_epochs"):
        assert field in out


def test_quickstart_train_evaluate_embed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *TINY]) == 0
    out = capsys.readouterr().out
    table = {line[:12].strip(): line[12:].split() for line in out.splitlines() if line[:12].strip()}
    assert table["accuracy, %"] == ["probe", "knn1_euclidean", "knn1_cosine"]
    for row in ("trained", "untrained", "raw pixels"):
        assert all(0 <= float(number) <= 100 for number in table[row])
    for name in ("curves.png", "neighbours.png", "encoder.safetensors", "metrics.csv", "versions.json"):
        assert (tmp_path / "runs" / "quickstart" / name).is_file()

    assert main(["train", "quickstart", "--loss", "infonce", *TINY]) == 2  # the folder is taken
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main(["train", "quickstart", "--loss", "infonce", *TINY, "--out", "other"]) == 0
    assert main(["evaluate", "other"]) == 0
    assert capsys.readouterr().out.count("%") >= 5
    assert main(["embed", "other", str(tmp_path / "runs"), "-o", "out.parquet"]) == 0  # the run's own pictures
    assert "2 images embedded, 0 skipped" in capsys.readouterr().out


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "torch_emc2", "presets"], capture_output=True, text=True, check=True)
    assert "stl10-b32" in done.stdout
    wrong = subprocess.run([sys.executable, "-m", "torch_emc2", "learn"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("emc2: error:")


def test_an_interrupt_ends_with_a_line_how_to_go_on(tiny: Config, tmp_path: Path) -> None:
    tiny.epochs, tiny.checkpoint_every_steps = 500, 1
    (tmp_path / "long.yaml").write_text(to_yaml(tiny))
    command = [sys.executable, "-m", "torch_emc2", "train", str(tmp_path / "long.yaml")]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell's children ignore it
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not (Path(tiny.out) / "checkpoints" / "last.ckpt").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("emc2: interrupted; emc2 train")
    assert "Traceback" not in err
