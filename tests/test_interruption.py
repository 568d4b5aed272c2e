"""A run that is stopped, whatever stops it, goes on bit for bit; two runs do not get mixed up."""

import copy
import csv
import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch

from outcomes import Outcome, assert_same, interrupt, outcome, photos, started
from torch_emc2.cli import main
from torch_emc2.config import Config, read_config, to_yaml
from torch_emc2.losses.registry import ESTIMATORS
from torch_emc2.run_folder import keep_finished, prepare_folder, refuse_used
from torch_emc2.runs.finished import load_run
from torch_emc2.training import ContrastiveModule, run_images, train
from torch_emc2.training.resume import refuse_another, validate_checkpoint


@pytest.mark.parametrize("loss", ESTIMATORS)
def test_resumes_bit_for_bit_in_mid_epoch(
    loss: str, tiny: Config, uninterrupted: Callable[[Config], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four batches an epoch: the checkpoint is of step 5, the stop after step 6, both in the second epoch.
    tiny = replace(tiny, loss=loss, checkpoint_every_steps=5)
    interrupt(tiny, 6, monkeypatch)
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


# Four batches an epoch. With accumulate 3 the second step of an epoch is of the one that is left.
@pytest.mark.parametrize(
    ("accumulate", "every", "stop"),
    [(1, None, 2), (1, None, 4), (1, None, 6), (1, 4, 7), (2, 1, 1), (2, 2, 3), (2, 3, 3), (3, 1, 3)],
)
def test_resumes_from_any_checkpoint(
    accumulate: int,
    every: int | None,
    stop: int,
    tiny: Config,
    uninterrupted: Callable[[Config], Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = replace(tiny, checkpoint_every_steps=every, accumulate=accumulate, epochs=2 if accumulate == 1 else 3)
    interrupt(tiny, stop, monkeypatch)
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


@pytest.mark.parametrize(("loss", "num_workers"), [("emc2", 0), ("emc2", 2), ("negative-cache", 0), ("sogclr", 0)])
def test_finite_views_resume_bit_for_bit(
    loss: str,
    num_workers: int,
    tiny: Config,
    uninterrupted: Callable[[Config], Outcome],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path_factory.getbasetemp() / "finite"  # one for all, as the runs that are compared must have
    data = replace(tiny.data, root=str(root), finite_views=4, num_workers=num_workers)
    tiny = replace(tiny, loss=loss, data=data, checkpoint_every_steps=5)
    interrupt(tiny, 6, monkeypatch)
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


@pytest.mark.parametrize("stop", [2, 4, 6])  # four batches an epoch: while the backbone is frozen, then, and after
def test_resumes_from_before_and_after_the_backbone_is_free(
    stop: int, tiny: Config, uninterrupted: Callable[[Config], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = replace(tiny.optimizer, freeze_epochs=1, backbone_lr_scale=0.5)
    tiny = replace(tiny, optimizer=optimizer, checkpoint_every_steps=1)
    interrupt(tiny, stop, monkeypatch)
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


def test_carried_policies_resume_too(
    tiny: Config, uninterrupted: Callable[[Config], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    for carry in ("cache", "encode_if_used"):
        config = replace(
            tiny, emc2=replace(tiny.emc2, carry=carry), checkpoint_every_steps=5, out=f"{tiny.out}-{carry}"
        )
        interrupt(config, 6, monkeypatch)
        assert_same(outcome(train(config, resume=True)), uninterrupted(config))


@pytest.mark.parametrize(("end", "num_workers"), [(signal.SIGKILL, 0), (signal.SIGKILL, 2), (signal.SIGINT, 2)])
def test_a_stopped_process_resumes_bit_for_bit(
    end: signal.Signals, num_workers: int, tiny: Config, uninterrupted: Callable[[Config], Outcome], tmp_path: Path
) -> None:
    tiny = replace(tiny, epochs=4, checkpoint_every_steps=3, data=replace(tiny.data, num_workers=num_workers))
    last = Path(tiny.out) / "checkpoints" / "last.ckpt"
    with started(tiny, tmp_path / "config.yaml", last.exists) as process:
        os.killpg(process.pid, end)  # as a terminal does: the loader's workers too
        _, err = process.communicate(timeout=60)
    if end == signal.SIGINT:
        assert process.returncode == 130
        (line,) = err.strip().splitlines()
        assert line.startswith(f"emc2: interrupted; emc2 train {tiny.out}/config.yaml --resume")
    assert torch.load(last, weights_only=True)["global_step"] < 16
    assert not (Path(tiny.out) / "encoder.safetensors").exists()
    assert main(["train", f"{tiny.out}/config.yaml", "--resume"]) == 0
    assert_same(outcome(Path(tiny.out)), uninterrupted(tiny))


@pytest.mark.parametrize(("end", "ranks"), [("KILL", "1"), ("TERM", "2")])
def test_killed_at_random_moments(end: str, ranks: str) -> None:
    loop = Path(__file__).parents[1] / "benchmarks" / "kill_loop.py"
    command = [sys.executable, str(loop), "--kills", "2", "--ranks", ranks, "--signal", end]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"2 kills by SIG{end}, 2 resumes, {ranks} rank(s), 88 steps: ")
    assert "0 differences" in done.stdout


class Send(L.Callback):
    """Sends SIGTERM in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_sigterm_saves_the_step_at_hand(
    accumulate: int, tiny: Config, uninterrupted: Callable[[Config], Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = replace(tiny, accumulate=accumulate)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        train(tiny, callbacks=[Send(2)])
    assert end.value.code is None  # which Python makes 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == f"emc2: stopped by SIGTERM; emc2 train {tiny.out}/config.yaml --resume goes on\n"
    assert torch.load(Path(tiny.out) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


@pytest.mark.parametrize("devices", [1, 2])
def test_sigterm_to_all_processes_or_to_the_first(devices: int, tiny: Config, tmp_path: Path) -> None:
    tiny = replace(tiny, epochs=200, devices=devices, batch_size=16 // devices)
    tiny = replace(tiny, data=replace(tiny.data, num_workers=2 - devices + 1), model=replace(tiny.model, norm="group"))
    run = Path(tiny.out)
    with started(tiny, tmp_path / "tiny.yaml", (run / "metrics.csv").exists) as process:
        if devices == 1:
            os.killpg(process.pid, signal.SIGTERM)  # the loader's workers too
        else:
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == f"emc2: stopped by SIGTERM; emc2 train {run}/config.yaml --resume goes on\n"
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == len(rows) < 800  # nothing is lost
    assert not (run / "encoder.safetensors").exists()


def test_a_rank_left_alone_says_so_in_a_line(tiny: Config, tmp_path: Path) -> None:
    tiny = replace(tiny, epochs=200, devices=2, batch_size=8, model=replace(tiny.model, norm="group"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first, second = (
        os.environ | world | {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        for rank in "01"
    )
    begun = (Path(tiny.out) / "metrics.csv").exists
    with (
        started(tiny, tmp_path / "tiny.yaml", lambda: True, first) as zero,
        started(tiny, tmp_path / "tiny.yaml", begun, second) as one,
    ):
        zero.kill()
        _, err = one.communicate(timeout=60)
    assert one.returncode == 2
    assert err == "emc2: error: rank 1 waited for one that has ended; that one's own error says why\n"


class SendAtSetup(L.Callback):
    """Sends SIGTERM before training starts."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_before_the_first_step(
    tiny: Config,
    uninterrupted: Callable[[Config], Outcome],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(run_images, "open_splits", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            train(tiny)
    assert end.value.code is None  # which Python makes 0
    assert capsys.readouterr().err == "emc2: stopped by SIGTERM; the run had not begun\n"
    assert not Path(tiny.out).exists()
    with pytest.raises(SystemExit) as end:
        train(tiny, callbacks=[SendAtSetup()])
    assert end.value.code is None
    assert capsys.readouterr().err == f"emc2: stopped by SIGTERM; emc2 train {tiny.out}/config.yaml --resume goes on\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


class SendAtStart(L.Callback):
    """Sends SIGTERM to Lightning's handler: several ranks have left it to the system before, as `meet` does."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_start(self, *args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_at_the_start_of_training_waits_for_the_first_step(
    tiny: Config, uninterrupted: Callable[[Config], Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train(tiny, callbacks=[SendAtStart()])
    assert end.value.code is None
    assert capsys.readouterr().err == f"emc2: stopped by SIGTERM; emc2 train {tiny.out}/config.yaml --resume goes on\n"
    assert torch.load(Path(tiny.out) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


def test_a_full_disk_keeps_the_checkpoint_before(
    tiny: Config,
    uninterrupted: Callable[[Config], Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = replace(tiny, checkpoint_every_steps=3)
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
    last = Path(tiny.out) / "checkpoints" / "last.ckpt"
    save = torch.save

    def full(checkpoint: Any, file: Any) -> None:
        if checkpoint["global_step"] == 6:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert main(["train", str(tmp_path / "tiny.yaml")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"emc2: error: {last} was not written, what was there is kept: No space left on device"
    assert torch.load(last, weights_only=True)["global_step"] == 4  # the epoch's
    assert list(last.parent.iterdir()) == [last]
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


def test_a_disk_that_is_really_full(tiny: Config, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a file system of its own needs root")
    try:
        tiny = replace(tiny, checkpoint_every_steps=1, out=str(disk / "run"))
        (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
        last = disk / "run" / "checkpoints" / "last.ckpt"

        class Fill(L.Callback):
            def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
                if trainer.global_step == 3:
                    free = os.statvfs(disk)
                    (disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - last.stat().st_size // 2))

        with pytest.raises(OSError, match=rf"{last} was not written, .*: No space left on device"):
            train(tiny, callbacks=[Fill()])
        assert torch.load(last, weights_only=True)["global_step"] == 3
        assert list(last.parent.iterdir()) == [last]
        (disk / "other").unlink()
        assert outcome(train(tiny, resume=True))[3][-1]["step"] == "7"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_resuming_a_finished_run_keeps_it(tiny: Config) -> None:
    before = outcome(train(tiny))
    (Path(tiny.out) / "encoder.safetensors").unlink()  # killed after the last step, before the encoder was written
    assert_same(outcome(train(tiny, resume=True)), before)


@pytest.mark.parametrize("damage", ["empty", "text", "foreign", "cut"])
def test_a_damaged_checkpoint_is_named(damage: str, tiny: Config) -> None:
    last = train(replace(tiny, epochs=1)) / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    if damage == "foreign":
        torch.save({"a": 1}, last)
    else:
        last.write_bytes({"empty": b"", "text": b"checkpoint", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*put another checkpoint in its place"):
        train(replace(tiny, epochs=1), resume=True)


def test_two_runs_do_not_share_a_folder(tiny: Config) -> None:
    run = train(tiny)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match="is not empty"):
        train(tiny)
    with pytest.raises(ValueError, match=r"config differs \(temperature: 0\.1, now 0\.3\)"):
        train(replace(tiny, temperature=0.3), resume=True)
    for norm in ("none", "group"):
        with pytest.raises(ValueError, match=rf"config differs \(model\.norm: batch, now {norm}"):
            train(replace(tiny, model=replace(tiny.model, norm=norm)), resume=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"config differs \(emc2\.num_chains: 1, now 2\)"):
        train(replace(tiny, emc2=replace(tiny.emc2, num_chains=2)), resume=True)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before
    other = replace(tiny, momentum=replace(tiny.momentum, decay=0.5))  # of a loss that the run has not
    assert train(other, resume=True) == run


def test_the_order_of_a_list_counts_on_resume(tiny: Config) -> None:
    def jittered(*jitter: float) -> Config:
        augmentation = replace(tiny.data.augmentation, jitter=jitter)  # type: ignore[arg-type]
        return replace(tiny, epochs=1, data=replace(tiny.data, augmentation=augmentation))

    train(jittered(0.4, 0.4, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"data\.augmentation\.jitter: \[0\.4, 0\.4, 0\.0, 0\.0\], now \[0\.0, 0\.0, "):
        train(jittered(0.0, 0.0, 0.4, 0.4), resume=True)


def test_the_images_count_on_resume(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = photos(tmp_path / "photos", 40)
    tiny = replace(tiny, loss="infonce", data=replace(tiny.data, name=name, limit=None, on_bad_image="skip"))
    interrupt(tiny, 3, monkeypatch)
    (tmp_path / "photos" / "7.png").unlink()
    with pytest.raises(ValueError, match=r"config differs \(images: 40, [0-9a-f]{16}, now 39, [0-9a-f]{16}\)"):
        train(tiny, resume=True)
    versions = Path(tiny.out) / "versions.json"
    versions.write_text(json.dumps(json.loads(versions.read_text()) | {"processes": 2}))
    with pytest.raises(ValueError, match=r"config differs .*processes: 2, now 1"):  # norms see a process's part
        train(tiny, resume=True)


def test_files_of_a_run_that_are_not_its_own_are_named(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(replace(tiny, epochs=1))
    last, saved = run / "checkpoints" / "last.ckpt", (run / "versions.json").read_text()
    for text in ("[1]", "null", "{"):
        (run / "versions.json").write_text(text)
        with pytest.raises(ValueError, match=r"versions\.json is damaged"):
            train(replace(tiny, epochs=1), resume=True)
    (run / "versions.json").write_text(saved)
    checkpoint = torch.load(last, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.startswith("encoder."))
    checkpoint["state_dict"][name] = torch.zeros(3)
    torch.save(checkpoint, last)
    with pytest.raises(ValueError, match=r"last\.ckpt is of another encoder"):
        train(replace(tiny, epochs=1), resume=True)
    for name in ("last.ckpt", "../encoder.safetensors", "../head.safetensors"):
        (last.parent / name).unlink()
    (run / "config.yaml").write_text("loss: emc2")  # the rest are defaults
    with pytest.raises(ValueError, match="config differs"):
        train(replace(tiny, epochs=1), resume=True)
    (run / "config.yaml").unlink()
    capsys.readouterr()
    train(replace(tiny, epochs=1), resume=True)
    assert capsys.readouterr().err == f"emc2: {run} has no checkpoint to go on from: starting\n"


def test_without_the_last_checkpoint_it_goes_on_from_the_newest_whole_one(
    tiny: Config, uninterrupted: Callable[[Config], Outcome], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tiny = replace(tiny, epochs=4, checkpoint_every_epochs=1)
    interrupt(tiny, 14, monkeypatch)
    folder = Path(tiny.out) / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == [
        "epoch-0.ckpt",
        "epoch-1.ckpt",
        "epoch-2.ckpt",
        "last.ckpt",
    ]
    (folder / "last.ckpt").unlink()
    (folder / "epoch-2.ckpt").write_bytes(b"cut")
    (folder / "epoch-1.ckpt").rename(folder / "a.ckpt")  # what counts is its step, not its name
    capsys.readouterr()
    got = outcome(train(tiny, resume=True))
    assert capsys.readouterr().err == f"emc2: {folder}/last.ckpt is gone: going on from a.ckpt, step 8\n"
    assert_same(got, uninterrupted(replace(tiny, checkpoint_every_epochs=None)))


@pytest.mark.parametrize("left", ["encoder.safetensors", "checkpoints/epoch-0.ckpt", "metrics.csv", "steps"])
def test_a_run_with_results_is_never_started_over(left: str, tiny: Config) -> None:
    run = Path(tiny.out)
    (run / "checkpoints").mkdir(parents=True)
    every = 3 if left == "steps" else None
    (run / "config.yaml").write_text(to_yaml(replace(tiny, checkpoint_every_steps=every)))
    rows = {"metrics.csv": "step,epoch\n0,0\n4,1\n", "steps": "step,epoch\n2,0\n3,0\n"}
    (run / ("metrics.csv" if left == "steps" else left)).write_text(rows.get(left, "damaged"))
    before = {file: file.read_text() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(
        ValueError, match=rf"{run} has results but no whole checkpoint to go on from: put one into {run}/"
    ):
        train(tiny, resume=True)
    assert {file: file.read_text() for file in run.rglob("*") if file.is_file()} == before


def test_a_start_in_the_folder_of_another_has_rows_of_its_own(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(tiny.out)
    interrupt(replace(tiny, temperature=0.5), 2, monkeypatch)
    (before,) = (run / "tensorboard").glob("events*")
    train(replace(tiny, epochs=1, log_every_steps=4))
    assert [row["step"] for row in outcome(run)[3]] == ["3"]
    (events,) = (run / "tensorboard").glob("events*")
    assert events.name != before.name
    shutil.rmtree(run / "checkpoints")
    for part in ("encoder", "head"):
        (run / f"{part}.safetensors").unlink()
    (run / "metrics.csv").write_text(rows := "step,epoch\n3,0\n7,1\n")  # a checkpoint's worth, which stays
    with pytest.raises(FileExistsError, match="is not empty"):
        train(tiny)
    assert (run / "metrics.csv").read_text() == rows


def test_a_finished_run_goes_on_to_more_epochs(
    tiny: Config, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny = replace(tiny, optimizer=replace(tiny.optimizer, lr=0.01, warmup_epochs=1))
    run = train(tiny)
    trained, words = (run / "encoder.safetensors").read_bytes(), "rates of 2 epochs up to step 8, then those of 5"
    capsys.readouterr()
    assert main(["train", f"{run}/config.yaml", "--resume", "--epochs", "5"]) == 0
    assert capsys.readouterr().err == f"emc2: {run} goes on, with the {words}\n"
    rows = outcome(run)[3]
    assert [int(row["step"]) for row in rows] == list(range(20))  # four steps an epoch
    warm = [0.01 * (step + 1) / 4 for step in range(4)]
    first, then = ([0.005 * (1 + math.cos(math.pi * (step - 4) / left)) for step in steps]
                   for left, steps in ((4, range(4, 8)), (16, range(8, 20))))  # fmt: skip
    assert [float(row["lr"]) for row in rows] == pytest.approx([*warm, *first, *then], rel=1e-5)
    assert (run / "encoder-2-epochs.safetensors").read_bytes() == trained
    assert (run / "encoder.safetensors").read_bytes() != trained
    caplog.set_level("INFO", "torch_emc2")
    caplog.clear()
    assert train(replace(tiny, epochs=5), resume=True) == run
    assert "All 5 epochs had been trained." in caplog.text
    assert json.loads((run / "versions.json").read_text())["schedule"] == [words]
    with pytest.raises(ValueError, match=r"config differs \(epochs: 5, now 2\)"):
        train(tiny, resume=True)


def test_a_finished_encoder_stays_until_a_longer_run_is_finished(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    two = read_config(str(run / "config.yaml"))
    facts, last = json.loads((run / "versions.json").read_text()), run / "checkpoints" / "last.ckpt"
    trained = (run / "encoder.safetensors").read_bytes()
    for epochs in (300, 3, 2):  # none of which takes a step: 300 is mistyped, 3 stopped, and 2 what there was
        config = replace(two, epochs=epochs)
        refuse_another(config, run, facts, last)
        prepare_folder(config, run, facts, last)
        assert load_run(run).config.epochs == epochs
        assert (run / "encoder.safetensors").read_bytes() == trained
    with pytest.raises(ValueError, match=r"config differs \(epochs: 2, now 1\)"):
        refuse_another(replace(two, epochs=1), run, facts, last)
    of_it = ["diagnosis.json", "evaluation-other.json", "evaluation.json", "map.png", "neighbours-other.png"]
    mine = ["header.csv", "neighbours-holiday.png", "encoder.backup.safetensors"]
    for name in [*of_it, *mine]:
        (run / name).write_text(name)
    keep_finished(run, 2)
    assert load_run(run)
    keep_finished(run, 3)
    assert sorted(file.name for file in run.glob("*.safetensors")) == [
        "encoder-2-epochs.safetensors",
        "encoder.backup.safetensors",
        "head-2-epochs.safetensors",
    ]
    for name in of_it:  # what was measured of the one encoder is not the other's
        assert not (run / name).exists()
        assert (run / name.replace(".", "-2-epochs.")).read_text() == name
    assert all((run / name).exists() for name in mine)
    prepare_folder(replace(two, epochs=3), run, facts, last)  # killed before the encoder was written
    with pytest.raises(ValueError, match=r"config differs \(epochs: 3, now 2\)"):
        refuse_another(two, run, facts, last)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    last, config = run / "checkpoints" / "last.ckpt", read_config(str(run / "config.yaml"))
    checkpoint = torch.load(last, weights_only=True)
    memory = checkpoint["state_dict"]["loss._extra_state"]
    module = ContrastiveModule(config, 1, 66)
    before = copy.deepcopy(module.state_dict())
    validate_checkpoint(last, module)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"last\.ckpt is of another loss"
    ):  # which has a momentum encoder beside the same
        validate_checkpoint(last, ContrastiveModule(replace(config, loss="momentum"), 1, 66))
    for foreign in (None, {"a": 1}, memory | {"chains": {}}, memory | {"seed": "0"}):
        checkpoint["state_dict"]["loss._extra_state"] = foreign
        torch.save(checkpoint, last)
        with pytest.raises(ValueError, match=r"last\.ckpt is of another loss \(.*put this run's in its place"):
            validate_checkpoint(last, module)
    kept = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="is of another loss"):
        train(replace(config, epochs=5), resume=True)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == kept


def test_a_second_training_is_refused_with_the_firsts_process(tiny: Config, tmp_path: Path, capsys: Any) -> None:
    tiny = replace(tiny, epochs=200, data=replace(tiny.data, num_workers=1))
    last = Path(tiny.out) / "checkpoints" / "last.ckpt"
    with started(tiny, tmp_path / "tiny.yaml", last.exists) as process:
        for words in ([], ["--resume"]):
            capsys.readouterr()
            assert main(["train", str(tmp_path / "tiny.yaml"), *words]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{tiny.out} is in use by process {process.pid} on {socket.gethostname()} since " in line
        process.kill()  # alone: its worker outlives it
        process.wait()
        steps = torch.load(last, weights_only=True)["global_step"]
        enough = 4 * (steps // 4 + 1)
        tiny = replace(tiny, epochs=200)

        class Enough(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
                trainer.should_stop = trainer.global_step >= enough

        train(tiny, resume=True, callbacks=[Enough()])
    assert torch.load(last, weights_only=True)["global_step"] == enough
    assert not (Path(tiny.out) / ".lock").exists()


def test_a_killed_worker_is_one_line_that_says_how_to_go_on(
    tiny: Config,
    uninterrupted: Callable[[Config], Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    tiny = replace(tiny, data=replace(tiny.data, num_workers=1))
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
    start = ContrastiveModule.on_train_batch_start

    def kill(module: ContrastiveModule, batch: Any, batch_idx: int) -> None:
        start(module, batch, batch_idx)
        if module.trainer.global_step == 5:
            (worker,) = multiprocessing.active_children()
            os.kill(cast(int, worker.pid), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveModule, "on_train_batch_start", kill)
        assert main(["train", str(tmp_path / "tiny.yaml")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("emc2: error: DataLoader worker ")  # its number, where the loader looks before it reads
    assert line.endswith(f"; emc2 train {tiny.out}/config.yaml --resume goes on from the last checkpoint")
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), torch.OutOfMemoryError, "CUDA out of memory. Tried"),
        (MemoryError(), MemoryError, "MemoryError()"),
        (RuntimeError("In worker 0.\nTraceback (most recent call last):\nOSError: own"), RuntimeError, "OSError: own"),
        (ConnectionResetError(104, "reset"), RuntimeError, "DataLoader worker ended: [Errno 104] reset"),
        (EOFError(), RuntimeError, "DataLoader worker ended: EOFError()"),
    ],
)  # fmt: skip
def test_what_stops_a_run_is_told_and_how_to_go_on(
    error: Exception, kind: type[Exception], words: str, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(ContrastiveModule, "training_step", fail)
    with pytest.raises(kind) as raised:
        train(tiny)
    assert str(raised.value) == f"{words}; emc2 train {tiny.out}/config.yaml --resume starts again: no checkpoint yet"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed"), RuntimeError, "pid 7) is killed; emc2 train "),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left on device"),
    ],
)  # fmt: skip
def test_what_stops_a_run_while_it_writes_for_tensorboard_is_told_as_it_is(
    error: Exception, kind: type[Exception], words: str, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
    with pytest.raises(kind, match=re.escape(words)):
        train(tiny)


def test_a_run_does_not_go_among_other_files(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(tiny)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_start_killed_while_it_wrote_a_file_leaves_a_folder_to_start_in(tmp_path: Path) -> None:
    refuse_used(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/last.ckpt"):
        file = tmp_path / "run" / name
        file.with_name(f".{file.name}.00aa11bb.{2**30}@elsewhere.partial").touch()
    refuse_used(tmp_path / "run")
    for name in (".config.yaml", "thesis.partial", "checkpoints/last.ckpt"):
        (tmp_path / "run" / name).touch()
        with pytest.raises(FileExistsError, match="is not empty"):
            refuse_used(tmp_path / "run")
        (tmp_path / "run" / name).unlink()


def test_what_results_do_not_depend_on_may_change(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, tiny = Path(tiny.out), replace(tiny, model=replace(tiny.model, norm="group"))
    interrupt(replace(tiny, checkpoint_every_steps=5), 6, monkeypatch)
    capfd.readouterr()
    moved = tmp_path / "moved"
    run.rename(moved)
    words = "--resume --data.num_workers 1 --log_every_steps 2 --checkpoint_every_steps 3 --checkpoint_every_epochs 2"
    words += " --data.root elsewhere --probe sgd"
    assert main(["train", f"{moved}/config.yaml", *words.split()]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert f"Run: {moved}. Next: emc2 evaluate {moved}" in out.splitlines()
    assert not run.exists()
    assert [row["step"] for row in outcome(moved)[3]] == ["0", "1", "2", "3", "4", "5", "7"]
    # As many samples a step on more devices are the same run, more samples another.
    versions = json.loads((moved / "versions.json").read_text())
    (moved / "versions.json").write_text(json.dumps(versions | {"processes": 2}))
    with pytest.raises(ValueError, match=r"config differs \(batch_size on all devices: 32, now 16\)"):
        train(replace(tiny, out=str(moved)), resume=True)
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace("batch_size: 16", "batch_size: 8"))
    assert train(replace(tiny, out=str(moved)), resume=True) == moved
