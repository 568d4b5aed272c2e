"""A run from its start to its end computes the same, however it is started."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outcomes import Outcome, assert_same, outcome, photos
from torch_emc2.config import Config, to_yaml
from torch_emc2.training import train


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


def test_finite_views_of_unreadable_images_are_skipped_and_counted(tiny: Config, tmp_path: Path) -> None:
    data = replace(tiny.data, name=photos(tmp_path / "photos", 20), limit=None, root=str(tmp_path), finite_views=4)
    with pytest.raises(ValueError, match=r"7\.png"):
        train(replace(tiny, data=data, batch_size=10))
    run = train(replace(tiny, data=replace(data, on_bad_image="skip"), batch_size=10))  # nothing is in its way
    rows = outcome(run)[3]
    assert [float(row["skipped"]) for row in (rows[1], rows[-1])] == [1, 2]  # once an epoch


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


def test_unreadable_images_are_skipped_and_counted(tiny: Config, tmp_path: Path) -> None:
    data = replace(tiny.data, name=photos(tmp_path / "photos", 20), limit=None)
    with pytest.raises(ValueError, match=r"7\.png"):
        train(replace(tiny, data=data, batch_size=10))
    run = train(replace(tiny, data=replace(data, on_bad_image="skip"), batch_size=10, out=tiny.out + "-skip"))
    rows = outcome(run)[3]
    assert [float(row["skipped"]) for row in (rows[1], rows[-1])] == [1, 2]  # once an epoch


def test_a_backbone_and_its_weights_are_looked_at_before_images(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("no weights")
    data = replace(tiny.data, name="folder:nowhere")
    for model, words in [
        (replace(tiny.model, backbone="resnet81"), "timm has no backbone 'resnet81'"),
        (replace(tiny.model, pretrained=str(tmp_path / "w.pth")), "are none of backbone 'test_resnet'"),
        (tiny.model, "'nowhere' is not a folder"),
    ]:
        with pytest.raises(ValueError, match=words):
            train(replace(tiny, model=model, data=data))
    assert not Path(tiny.out).exists()


def test_training_from_python_is_quiet(tiny: Config, capfd: pytest.CaptureFixture[str]) -> None:
    train(replace(tiny, epochs=1))
    out, err = capfd.readouterr()
    assert err == ""
    (line,) = out.splitlines()
    assert line.startswith("Epoch 1/1: global loss ")


def test_torchrun_trains_as_one_process_and_with_a_backbone_that_is_frozen_at_first(
    tiny: Config, tmp_path: Path
) -> None:
    optimizer = replace(tiny.optimizer, freeze_epochs=1)
    tiny = replace(tiny, model=replace(tiny.model, norm="group"), precision="64-true", log_every_steps=9)
    tiny = replace(tiny, optimizer=optimizer)
    one = outcome(train(replace(tiny, out=tiny.out + "-one")))[3]
    assert [row["step"] for row in one] == ["3", "7"]  # one an epoch, at least
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "torch_emc2", "train", str(tmp_path / "tiny.yaml"), "--devices", "2", "--batch_size", "8"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run: ") == 1
    two = outcome(Path(tiny.out))[3]
    assert [row.keys() for row in two] == [row.keys() for row in one]
    for name in one[0]:
        assert [float(row[name]) for row in two] == pytest.approx([float(row[name]) for row in one], abs=1e-4), name
