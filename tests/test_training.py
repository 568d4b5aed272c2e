"""A run: that it goes on where it was stopped, bit for bit, and computes what it says."""

import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm.optim
import torch
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from torch_emc2 import training
from torch_emc2.callbacks import MetricsFile, WholeCheckpoints
from torch_emc2.cli import main
from torch_emc2.config import Config, LossName, OptimizerConfig, to_yaml
from torch_emc2.losses import EMC2Loss
from torch_emc2.training import ContrastiveData, ContrastiveModule, train

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
        original = training._checkpoints
        patch.setattr(training, "_checkpoints", lambda *args: [*original(*args), StopAfter(steps)])
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


@pytest.fixture(scope="module")
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


def photos(folder: Path, number: int) -> str:
    """Write a folder of noise, its seventh image unreadable; returns its name as a data set."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        pixels = torch.randint(256, (12, 12, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "7.png").write_bytes(b"no image")
    return f"folder:{folder}"


@pytest.mark.parametrize("loss", ["emc2", "infonce", "dcl", "sogclr", "negative-cache"])
def test_resumes_bit_for_bit_in_mid_epoch(
    loss: LossName, tiny: Config, uninterrupted: Callable[[Config], Outcome], monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize("finite_views", [2, 4])
def test_finite_views_have_a_chain_each(finite_views: int, tiny: Config, tmp_path: Path) -> None:
    data = replace(tiny.data, root=str(tmp_path), finite_views=finite_views)
    run = train(replace(tiny, data=data, epochs=6))
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    ids = state["loss._extra_state"]["chains"]["ids"][:, 0]
    assert len(ids) == 66 * finite_views
    visited = (ids >= 0).nonzero()[:, 0]
    assert len(visited) > 66  # more than a view a sample
    assert ids.max() < 66 * finite_views
    assert (ids[visited] // finite_views != visited // finite_views).all()  # never at a view of the own sample


@pytest.mark.parametrize(("loss", "num_workers"), [("emc2", 0), ("emc2", 2), ("negative-cache", 0), ("sogclr", 0)])
def test_finite_views_resume_bit_for_bit(
    loss: LossName,
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


def test_finite_views_of_unreadable_images_are_skipped_and_counted(tiny: Config, tmp_path: Path) -> None:
    data = replace(tiny.data, name=photos(tmp_path / "photos", 20), limit=None, root=str(tmp_path), finite_views=4)
    with pytest.raises(ValueError, match=r"7\.png"):
        train(replace(tiny, data=data, batch_size=10))
    run = train(replace(tiny, data=replace(data, on_bad_image="skip"), batch_size=10))  # nothing is in its way
    rows = outcome(run)[3]
    assert [float(row["skipped"]) for row in (rows[1], rows[-1])] == [1, 2]  # once an epoch


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
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny))
    last = Path(tiny.out) / "checkpoints" / "last.ckpt"
    with subprocess.Popen(
        [sys.executable, "-m", "torch_emc2", "train", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell's children ignore it
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not last.exists():
                assert process.poll() is None, "the run ended before it could be stopped"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.killpg(process.pid, end)  # as a terminal does: the loader's workers too
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    if end == signal.SIGINT:
        assert process.returncode == 130
        (line,) = err.strip().splitlines()
        assert line.startswith(f"emc2: interrupted; emc2 train {tiny.out}/config.yaml --resume")
    assert torch.load(last, weights_only=True)["global_step"] < 16
    assert not (Path(tiny.out) / "encoder.safetensors").exists()
    assert main(["train", f"{tiny.out}/config.yaml", "--resume"]) == 0
    assert_same(outcome(Path(tiny.out)), uninterrupted(tiny))


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


def test_a_row_is_written_before_the_checkpoint_of_its_step(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    save, seen = WholeCheckpoints.save_checkpoint, []

    def spy(self: WholeCheckpoints, checkpoint: Any, path: Path, **options: Any) -> None:
        with (Path(tiny.out) / "metrics.csv").open(newline="") as file:
            seen.append((checkpoint["global_step"], len(list(csv.DictReader(file)))))
        save(self, checkpoint, path)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", spy)
    train(replace(tiny, checkpoint_every_steps=1, epochs=1))
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4), (4, 4)]


def test_results_do_not_depend_on_workers(tiny: Config, uninterrupted: Callable[[Config], Outcome]) -> None:
    run = train(replace(tiny, data=replace(tiny.data, num_workers=2)))
    assert_same(outcome(run), uninterrupted(tiny))  # without workers


def test_two_processes_train_as_one(tiny: Config, tmp_path: Path) -> None:
    # Group norm: batch norm's statistics are those of a rank's part. Double precision: a rounding that turns a chain's
    # decision would show in all that follows.
    data = replace(tiny.data, name=photos(tmp_path / "photos", 66), limit=None, on_bad_image="skip")
    tiny = replace(tiny, model=replace(tiny.model, norm="group"), data=data, precision="64-true")
    one = outcome(train(replace(tiny, out=tiny.out + "-one")))
    config = tmp_path / "two.yaml"
    config.write_text(to_yaml(replace(tiny, batch_size=8, devices=2)))
    command = [sys.executable, "-m", "torch_emc2", "train", str(config)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    two = outcome(Path(tiny.out))
    for name in ("loss", "global_loss", "skipped", "lr"):
        got, want = ([float(row[name]) for row in rows] for rows in (two[3], one[3]))
        assert got == pytest.approx(want, abs=1e-6), name
    torch.testing.assert_close(two[2], one[2], rtol=1e-5, atol=1e-5)  # the chains, on every rank alike


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
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before


def test_the_order_of_a_list_counts_on_resume(tiny: Config) -> None:
    def jittered(*jitter: float) -> Config:
        augmentation = replace(tiny.data.augmentation, jitter=jitter)  # type: ignore[arg-type]
        return replace(tiny, epochs=1, data=replace(tiny.data, augmentation=augmentation))

    train(jittered(0.4, 0.4, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"data\.augmentation\.jitter: \[0\.4, 0\.4, 0\.0, 0\.0\], now \[0\.0, 0\.0, "):
        train(jittered(0.0, 0.0, 0.4, 0.4), resume=True)


def test_a_run_does_not_go_among_other_files(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(tiny)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("finite_views", [None, 2])
def test_a_step_is_the_loss_of_both_views_and_the_carried(
    finite_views: int | None, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(tiny, data=replace(tiny.data, root=str(tmp_path), finite_views=finite_views))
    seen: list[tuple[Any, Tensor, Weights, Any]] = []
    step = ContrastiveModule.training_step

    def spy(module: ContrastiveModule, batch: Any, batch_idx: int) -> Tensor:
        before = {name: value.clone() for name, value in module.encoder.state_dict().items()}
        memory = module.loss.get_extra_state()
        memory = {**memory, "chains": {name: table.clone() for name, table in memory["chains"].items()}}
        loss = step(module, batch, batch_idx)
        seen.append((batch, loss.detach(), before, memory))
        return loss

    def keep(module: ContrastiveModule) -> None:
        gradients.append({name: value.grad.clone() for name, value in module.encoder.named_parameters()})

    gradients: list[Any] = []
    monkeypatch.setattr(ContrastiveModule, "training_step", spy)
    monkeypatch.setattr(ContrastiveModule, "on_after_backward", keep)
    train(tiny)
    batch, loss, weights, memory = seen[-1]
    assert len(batch.carried) > 0
    module = ContrastiveModule(tiny, 1, 66)
    module.encoder.load_state_dict(weights)
    module.loss.set_extra_state(memory)
    z = module.encoder(torch.cat([batch.first, batch.second, batch.carried]))
    size = len(batch.index)
    carried = dict(zip(batch.carried_ids.tolist(), z[2 * size :], strict=True))
    assert isinstance(module.loss, EMC2Loss)
    expected = module.loss(
        z[:size], z[size : 2 * size], batch.index, lambda ids: torch.stack([carried[i] for i in ids.tolist()])
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=0)
    expected.backward()
    by_hand = {name: value.grad for name, value in module.encoder.named_parameters()}
    torch.testing.assert_close(gradients[-1], by_hand, rtol=1e-5, atol=1e-7)
    # The images are those that the table named.
    named = memory["chains"]["ids"][batch.index]
    assert batch.carried_ids.tolist() == sorted(set(named[named >= 0].tolist()))


def test_learning_rate_warms_up_and_falls_by_half_a_cosine(tiny: Config) -> None:
    run = train(replace(tiny, epochs=5, optimizer=OptimizerConfig(lr=0.01, warmup_epochs=1.5)))
    with (run / "metrics.csv").open(newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    warm = [0.01 * (step + 1) / 6 for step in range(6)]  # four batches an epoch
    cosine = [0.005 * (1 + math.cos(math.pi * step / 14)) for step in range(14)]
    assert rates == pytest.approx([*warm, *cosine], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", timm.optim.Lars)],
)
def test_optimisers(name: Any, kind: type, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ContrastiveModule(replace(tiny, optimizer=OptimizerConfig(name, 0.1, 0.01, 0.8)), 1, 66)
    module.trainer = type("Trainer", (), {"world_size": 1})()  # type: ignore[assignment]
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is kind
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decayed) == len(list(module.encoder.parameters()))
    assert all(decayed[id(p)] == (0.01 if p.ndim > 1 else 0) for p in module.encoder.parameters())
    if name in ("sgd", "lars"):
        assert all(group["momentum"] == 0.8 and not group["nesterov"] for group in optimizer.param_groups)


def test_similarities_are_float32_under_bf16(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    weigh = EMC2Loss._weigh

    def spy(self: EMC2Loss, pairs: Any, logits: Tensor, *args: Any) -> Any:
        seen.append((pairs.rows.dtype, logits.dtype))
        return weigh(self, pairs, logits, *args)

    monkeypatch.setattr(EMC2Loss, "_weigh", spy)
    run = train(replace(tiny, precision="bf16-mixed"))
    assert set(seen) == {(torch.float32, torch.float32)}
    assert all(math.isfinite(float(row["loss"])) for row in outcome(run)[3])


def test_unreadable_images_are_skipped_and_counted(tiny: Config, tmp_path: Path) -> None:
    data = replace(tiny.data, name=photos(tmp_path / "photos", 20), limit=None)
    with pytest.raises(ValueError, match=r"7\.png"):
        train(replace(tiny, data=data, batch_size=10))
    run = train(replace(tiny, data=replace(data, on_bad_image="skip"), batch_size=10, out=tiny.out + "-skip"))
    rows = outcome(run)[3]
    assert [float(row["skipped"]) for row in (rows[1], rows[-1])] == [1, 2]  # once an epoch


def test_metrics_file_widens_and_cuts(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.write({"loss": 1.0}, 0)
    file.write({"loss": 2.0, "skipped": 1.0}, 1)
    file.write({"loss": 3.0}, 2)
    again = MetricsFile(tmp_path / "metrics.csv")
    again.write({"loss": 4.0}, 1)
    again.write({"loss": 5.0}, 2)
    with (tmp_path / "metrics.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert rows == [
        {"step": "0", "loss": "1", "skipped": ""},
        {"step": "1", "loss": "4", "skipped": ""},
        {"step": "2", "loss": "5", "skipped": ""},
    ]


@pytest.mark.parametrize(("accumulate", "every", "steps"), [(1, 3, [2, 5]), (1, 10, [3, 7]), (2, 1, [0, 1, 2, 3])])
def test_a_row_each_so_many_steps(accumulate: int, every: int, steps: list[int], tiny: Config) -> None:
    rows = outcome(train(replace(tiny, accumulate=accumulate, log_every_steps=every)))[3]
    assert [int(row["step"]) for row in rows] == steps
    assert [int(row["epoch"]) for row in rows] == [step // math.ceil(4 / accumulate) for step in steps]


def test_data_is_placed_after_the_steps_taken(tiny: Config) -> None:
    images = training.open_dataset("digits", "train", Path("data"), limit=66)
    data = ContrastiveData(replace(tiny, accumulate=2), images, None)

    def batches_after(steps: int) -> list[list[int]]:
        strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()
        names = {"global_step": steps, "global_rank": 0, "world_size": 1, "strategy": strategy}
        data.trainer = type("Trainer", (), names)()  # type: ignore[assignment]
        return [batch.index.tolist() for batch in data.train_dataloader()]

    first, second = batches_after(0), batches_after(2)  # two steps of two batches are an epoch
    assert len(first) == len(second) == 4
    assert first != second
    assert batches_after(1) == first[2:]
    assert batches_after(3) == second[2:]


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
    config = tmp_path / "tiny.yaml"
    config.write_text(to_yaml(tiny))
    run = Path(tiny.out)
    with subprocess.Popen(
        [sys.executable, "-m", "torch_emc2", "train", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not (run / "metrics.csv").exists():
                assert process.poll() is None, "the run ended before it could be stopped"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if devices == 1:
                os.killpg(process.pid, signal.SIGTERM)  # the loader's workers too
            else:
                process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert err == f"emc2: stopped by SIGTERM; emc2 train {run}/config.yaml --resume goes on\n"
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == len(rows) < 800  # nothing is lost
    assert not (run / "encoder.safetensors").exists()


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


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    file.write({"loss": 1.0}, 0)
    whole = path.read_text()

    class Full(csv.DictWriter):  # type: ignore[type-arg]
        def __init__(self, stream: Any, *args: Any) -> None:
            super().__init__(stream, *args)
            self.stream = stream

        def writerow(self, row: Any) -> None:
            self.stream.write("1,")
            self.stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(csv, "DictWriter", Full)
    with pytest.raises(OSError, match=rf"{path}: row 1 was not written: No space left on device"):
        file.write({"loss": 2.0}, 1)
    assert path.read_text() == whole


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


@pytest.mark.parametrize("where", ["loss", "gradient", "embedding"])
def test_a_step_that_is_not_finite_stops_the_run(
    where: str,
    tiny: Config,
    uninterrupted: Callable[[Config], Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = replace(tiny, checkpoint_every_steps=5)
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
    last = Path(tiny.out) / "checkpoints" / "last.ckpt"
    ids: list[int] = []

    def strike(module: ContrastiveModule, batch: Any, batch_idx: int) -> None:
        start(module, batch, batch_idx)
        if module.trainer.global_step == 6:
            ids.extend(batch.index.tolist())
            if where == "embedding":
                batch.first[3] = math.nan
            elif where == "loss":
                monkeypatch.setattr(module.loss, "temperature", math.nan)

    def spoil(module: ContrastiveModule) -> None:
        if where == "gradient" and module.trainer.global_step == 6:
            next(module.encoder.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]

    start = ContrastiveModule.on_train_batch_start
    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveModule, "on_train_batch_start", strike)
        patch.setattr(ContrastiveModule, "on_after_backward", spoil)
        if where == "embedding":
            tiny = replace(tiny, model=replace(tiny.model, norm="group"))  # one image, one embedding
            (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
        assert main(["train", str(tmp_path / "tiny.yaml")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    first = ", ".join(map(str, ids[:5]))
    if where == "embedding":
        assert line.startswith("emc2: error: step 6: z1[3] is not finite")
        assert line.endswith(f"samples {ids[3]}")
    else:
        assert line.startswith(f"emc2: error: step 6: the {where} is not finite (loss ")
        assert f"samples {first}, …" in line
        assert "global_loss" in line
        assert ("gradient_norm inf" in line) == (where == "gradient")
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 5
    assert all(value.isfinite().all() for name, value in state["state_dict"].items() if name.startswith("encoder."))
    # The chains that moved in the step are not in the checkpoint either.
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


@pytest.mark.parametrize("scale", [2.0**127, 1.0])
def test_an_overflow_of_the_scaling_is_skipped(
    scale: float, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = training.open_dataset("digits", "train", Path("data"), limit=66)
    module = ContrastiveModule(replace(tiny, emc2=replace(tiny.emc2, carry="drop")), images.channels, len(images))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )

    def spoil(module: ContrastiveModule) -> None:
        next(module.encoder.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]

    monkeypatch.setattr(ContrastiveModule, "on_after_backward", spoil)
    before = {name: value.clone() for name, value in module.encoder.named_parameters()}
    if scale == 1:  # nothing is scaled: the gradient itself is infinite
        with pytest.raises(ValueError, match="step 0: the gradient is not finite"):
            trainer.fit(module, ContrastiveData(tiny, images, None))
    else:
        trainer.fit(module, ContrastiveData(tiny, images, None))
        assert scaler.get_scale() == scale / 2
        assert isinstance(module.loss, EMC2Loss)
        assert int((module.loss.chains.ids.data >= 0).sum()) == 16  # the chains moved, the weights did not
    torch.testing.assert_close(dict(module.encoder.named_parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [3, 4, 5])
def test_a_steps_gradient_is_the_mean_over_its_batches(
    accumulate: int, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(tiny, loss="infonce", accumulate=accumulate, epochs=1, precision="64-true")
    batches: list[Any] = []
    steps: list[Any] = []
    step = ContrastiveModule.training_step

    def spy(module: ContrastiveModule, batch: Any, batch_idx: int) -> Tensor:
        batches.append(batch)
        return step(module, batch, batch_idx)

    def keep(module: ContrastiveModule, optimizer: Any) -> None:
        gradients = {name: value.grad.clone() for name, value in module.encoder.named_parameters()}  # type: ignore
        weights = {name: value.clone() for name, value in module.encoder.state_dict().items()}
        steps.append((gradients, weights, list(batches)))
        batches.clear()

    monkeypatch.setattr(ContrastiveModule, "training_step", spy)
    monkeypatch.setattr(ContrastiveModule, "on_before_optimizer_step", keep)
    train(tiny)
    assert [len(group) for *_, group in steps] == {3: [3, 1], 4: [4], 5: [4]}[accumulate]
    for gradients, weights, group in steps:
        module = ContrastiveModule(tiny, 1, 66).double()
        module.encoder.load_state_dict(weights)
        losses = [module.loss(module.encoder(batch.first), module.encoder(batch.second)) for batch in group]
        if tiny.model.norm == "batch":  # whose statistics are of both views
            losses = [module.loss(*module.encoder(torch.cat([b.first, b.second])).chunk(2)) for b in group]
        torch.stack(losses).mean().backward()
        by_hand = {name: value.grad for name, value in module.encoder.named_parameters()}
        torch.testing.assert_close(gradients, by_hand)


def test_what_results_do_not_depend_on_may_change(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(tiny.out)
    interrupt(replace(tiny, checkpoint_every_steps=5), 6, monkeypatch)
    capfd.readouterr()
    moved = tmp_path / "moved"
    run.rename(moved)
    words = "--resume --data.num_workers 1 --log_every_steps 2 --checkpoint_every_steps 3 --checkpoint_every_epochs 2"
    assert main(["train", f"{moved}/config.yaml", *words.split()]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == f"Run: {moved}. Next: emc2 evaluate {moved}"
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


def test_training_from_python_is_quiet(tiny: Config, capfd: pytest.CaptureFixture[str]) -> None:
    train(replace(tiny, epochs=1))
    out, err = capfd.readouterr()
    assert err == ""
    (line,) = out.splitlines()
    assert line.startswith("Epoch 1/1: loss ")


def test_torchrun_trains_as_one_process(tiny: Config, tmp_path: Path) -> None:
    tiny = replace(tiny, model=replace(tiny.model, norm="group"), precision="64-true", epochs=1)
    one = outcome(train(replace(tiny, out=tiny.out + "-one")))[3]
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "torch_emc2", "train", str(tmp_path / "tiny.yaml"), "--devices", "2", "--batch_size", "8"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = outcome(Path(tiny.out))[3]
    assert [row.keys() for row in two] == [row.keys() for row in one]
    for name in one[0]:
        assert [float(row[name]) for row in two] == pytest.approx([float(row[name]) for row in one], abs=1e-4), name


def test_killed_at_random_moments() -> None:
    loop = Path(__file__).parents[1] / "benchmarks" / "kill_loop.py"
    done = subprocess.run([sys.executable, str(loop), "--kills", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 kills, 3 resumes, 1 rank(s), 88 steps: ")
    assert "0 differences" in done.stdout
