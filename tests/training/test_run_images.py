"""The images of a run: those that it began with, whatever becomes of the others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from PIL import Image

from outcomes import assert_same, break_inside, outcome
from torch_emc2.cli import main
from torch_emc2.config import Config, read_config, to_yaml
from torch_emc2.data import BadImageError, DataError, ImageDataset, identity
from torch_emc2.training import train
from torch_emc2.training.run_images import evaluation_parts, first_images, same_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two splits of two classes, two of the 20 + 8 images unreadable."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("valid", 4)):
        for name in "ab":
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photos" / "train" / "a" / "3.png").write_bytes(b"no image")
    (tmp_path / "photos" / "valid" / "b" / "2.png").write_bytes(b"")
    return tmp_path / "photos"


@pytest.fixture
def config(tiny: Config, photos: Path) -> Config:
    data = replace(tiny.data, name=f"folder:{photos}", limit=None, on_bad_image="skip")
    return replace(tiny, data=data, batch_size=5, loss="infonce")


def _names(images: ImageDataset, folder: Path) -> list[str]:
    return [str(Path(str(images.path(i))).relative_to(folder)) for i in range(len(images))]


def _raising(config: Config) -> Config:
    return replace(config, data=replace(config.data, on_bad_image="raise"))


def test_unreadable_images_of_every_part_are_listed_at_the_start(config: Config, photos: Path, tmp_path: Path) -> None:
    for i in range(4, 8):
        (photos / "train" / "a" / f"{i}.png").write_bytes(b"")
    run = tmp_path / "run"
    with pytest.raises(BadImageError) as error:
        first_images(_raising(config), run)
    assert str(error.value) == (
        f"6 images cannot be read: {str(photos / 'train/a/3.png')!r} (of no kind that Pillow opens here); "
        f"{str(photos / 'train/a/4.png')!r} (empty); {str(photos / 'train/a/5.png')!r} (empty); …: "
        f"all in {run / 'unreadable.json'}; mend or remove them, or add --data.on_bad_image skip"
    )
    listed = json.loads((run / "unreadable.json").read_text())
    assert list(listed) == [*(f"train/a/{i}.png" for i in range(3, 8)), "valid/b/2.png"]


def test_a_start_that_came_to_nothing_is_in_no_ones_way(
    config: Config, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos.parent / "my.yaml").write_text(to_yaml(_raising(config)))
    command = ["train", str(photos.parent / "my.yaml")]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("mend or remove them, or add --data.on_bad_image skip")
    assert main([*command, "--data.on_bad_image", "skip"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{str(photos)!r}: 20 training images in 'train/', 2 classes of 10 images.")
    assert out.count(out[0]) == 1  # though several parts of it were opened
    assert out[1].startswith(f"Unreadable, and left out: 2 of 28 images (all in {config.out}/unreadable.json): '")
    assert main(command) == 2  # a run that has a checkpoint is not begun anew
    assert "is not empty" in capsys.readouterr().err


def test_a_run_goes_on_with_the_images_it_began_with(config: Config, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = first_images(config, run)
    expected = [f"train/{name}/{i}.png" for name in "ab" for i in range(10) if (name, i) != ("a", 3)]
    assert _names(first, photos) == expected
    assert first.labels is not None
    assert first.labels.tolist() == [0] * 9 + [1] * 10
    for change in (
        lambda file: Image.new("RGB", (9, 9)).save(file),  # mended
        lambda file: file.unlink(),
        lambda file: break_inside(photos / "train" / "b" / "5.png"),  # another broke
    ):
        change(photos / "train" / "a" / "3.png")
        images = same_images(_raising(config), run)
        assert _names(images, photos) == expected
        assert identity(images) == identity(first)
    (photos / "train" / "b" / "5.png").unlink()
    assert identity(same_images(config, run)) != identity(first)


@pytest.mark.parametrize("name", ["folder:.", "folder:./", "folder:../photos/", "folder:../photos/train/.."])
def test_what_is_left_out_is_found_again_however_the_folder_is_called(
    name: str, config: Config, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    config = replace(config, data=replace(config.data, name=name))
    assert len(first_images(config, tmp_path / "run")) == len(same_images(config, tmp_path / "run")) == 19


def test_a_new_start_forgets_what_was_left_out(config: Config, photos: Path, tmp_path: Path) -> None:
    first_images(config, tmp_path / "run")
    for name in ("train/a/3.png", "valid/b/2.png"):
        (photos / name).unlink()
    assert len(first_images(config, tmp_path / "run")) == 19
    assert not (tmp_path / "run" / "unreadable.json").exists()


def test_parts_follow_the_run_s_setting(config: Config, photos: Path, tmp_path: Path) -> None:
    break_inside(photos / "valid" / "a" / "1.png")
    _, test = evaluation_parts(config, tmp_path / "run")
    assert _names(test, photos) == ["valid/a/0.png", "valid/a/2.png", "valid/a/3.png"] + [
        f"valid/b/{i}.png" for i in (0, 1, 3)
    ]
    assert test.labels is not None
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(BadImageError, match=r"2 images cannot .*2\.png' \(empty\): .* data\.on_bad_image: skip in "):
        evaluation_parts(_raising(config), tmp_path / "run")


def test_where_too_few_can_be_read_that_is_said(config: Config, photos: Path, tmp_path: Path) -> None:
    for file in photos.glob("valid/*/*.png"):
        file.write_bytes(b"")
    first, run = str(photos / "valid/a/0.png"), tmp_path / "run"
    with pytest.raises(DataError, match=rf"^0 of 8 images can be read, at least 1 are needed: '{first}' \(empty\); "):
        evaluation_parts(config, run)
    assert len(first_images(config, run)) == 19  # training needs no test part
    for file in sorted(photos.glob("train/*/*.png"))[1:]:
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"^1 of 20 images can be read, at least 2 are needed: '.*/train/a/1\.png' "):
        first_images(config, run)


def test_the_range_found_at_the_start_is_the_run_s(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    for i, most in enumerate((65535, 900, 300)):
        Image.fromarray(np.array([[0, most]], np.uint16)).save(folder / f"{i}.png")
    config = replace(config, data=replace(config.data, name=f"folder:{folder}"))
    images = first_images(config, tmp_path / "start")
    assert [int(images.image(i)[0, 0, 1]) for i in range(3)] == [255, 4, 1]
    run = train(replace(config, batch_size=3, epochs=1))
    assert json.loads((run / "versions.json").read_text())["value_range"] == "0,65535"
    assert read_config(str(run / "config.yaml")).data.value_range is None  # none was given

    (folder / "0.png").unlink()
    assert int(same_images(config, run).image(0)[0, 0, 1]) == 4
    assert len(evaluation_parts(_raising(config), run)[0]) == 1
    for start in (
        lambda: first_images(_raising(config), tmp_path / "start"),
        lambda: evaluation_parts(_raising(config), run, own=False),
    ):
        with pytest.raises(DataError, match="2 images with 16-bit values, from 0 to 900, of no known range"):
            start()


def _deep(folder: Path, *largest: int) -> None:
    folder.mkdir(parents=True)
    for i, value in enumerate(largest):
        Image.fromarray(np.array([[0, value]], np.uint16)).save(folder / f"{i}.png")


@pytest.mark.parametrize("own", [True, False])
def test_the_range_of_deep_values_is_that_of_all_parts(own: bool, config: Config, tmp_path: Path) -> None:
    _deep(tmp_path / "deep" / "train", 65535, 900)
    _deep(tmp_path / "deep" / "test", 257 * 51)
    config = _raising(replace(config, data=replace(config.data, name=f"folder:{tmp_path / 'deep'}")))
    _, test = evaluation_parts(config, tmp_path / "run", own=own)
    assert int(test.image(0)[0, 0, 1]) == 51


def test_what_the_run_left_out_is_not_evaluated_of_its_own_data(config: Config, photos: Path, tmp_path: Path) -> None:
    first_images(config, tmp_path / "run")
    for name in ("train/a/3.png", "valid/b/2.png"):
        Image.new("RGB", (9, 9)).save(photos / name)
    (photos / "train" / "b" / "5.png").write_bytes(b"")
    assert [len(part) for part in evaluation_parts(config, tmp_path / "run")] == [18, 7]
    assert [len(part) for part in evaluation_parts(config, tmp_path / "run", own=False)] == [19, 8]


def test_what_is_advised_when_an_image_breaks_goes_on(
    config: Config, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train/a/3.png", "valid/b/2.png"):
        (photos / name).unlink()

    class Break(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 1:
                break_inside(photos / "train" / "b" / "5.png")

    with pytest.raises(BadImageError, match=r"5\.png") as error:
        train(_raising(config), callbacks=[Break()])
    *_, advice = str(error.value).split(": ")
    command, end = advice.split(" goes on ")
    assert (command.split()[0], end) == ("emc2", "without it")
    assert main(command.split()[1:]) == 0
    assert float(outcome(Path(config.out))[3][-1]["skipped"]) == 1
    assert capsys.readouterr().err == ""


def test_an_image_that_was_lost_is_to_be_put_back(config: Config, photos: Path) -> None:
    for name in ("train/a/3.png", "valid/b/2.png"):
        (photos / name).unlink()
    lost, kept = photos / "train" / "b" / "5.png", photos.parent / "kept.png"
    whole = outcome(train(_raising(replace(config, out=config.out + "-whole"))))

    class Lose(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 1:
                lost.rename(kept)

    with pytest.raises(BadImageError, match=r"put back all images as they were, then emc2 train .* --resume goes on$"):
        train(_raising(config), callbacks=[Lose()])
    kept.rename(lost)
    assert_same(outcome(train(_raising(config), resume=True)), whole)


def test_a_relative_folder_counts_from_where_the_run_was_started(
    config: Config,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos.parent)
    config = replace(config, data=replace(config.data, name=f"folder:{photos.name}"), epochs=1)
    run = train(config)
    first = [image.read_bytes() for image in map(Path, same_images(config, run).files())]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(photos, elsewhere / photos.name)
    for file in (elsewhere / photos.name).glob("*/*/*.png"):  # other images of the same names
        Image.new("RGB", (9, 9)).save(file)
    monkeypatch.chdir(elsewhere)

    def contents(images: ImageDataset) -> list[bytes]:
        return [Path(file).read_bytes() for file in images.files()]

    capsys.readouterr()
    assert main(["train", str(run / "config.yaml"), "--resume", "--epochs", "2"]) == 0
    assert f"emc2 embed {run} {photos} -o" in capsys.readouterr().out
    assert contents(same_images(config, run)) == first
    assert contents(evaluation_parts(config, run)[0]) == first
    shutil.rmtree(run / "checkpoints")  # it starts again, and with the same
    for file in (*run.glob("*.safetensors"), *run.glob("metrics*")):
        file.unlink()
    assert main(["train", str(run / "config.yaml"), "--resume"]) == 0
    assert contents(same_images(config, run)) == first
    with pytest.raises(ValueError, match="is not a folder here"):  # a new run counts from here
        first_images(replace(config, data=replace(config.data, name="folder:none")), tmp_path / "new")

    shutil.rmtree(elsewhere / photos.name)
    photos.rename(elsewhere / photos.name)
    caplog.set_level("INFO", "torch_emc2")
    assert contents(same_images(config, run)) == first
    assert f"{str(elsewhere / photos.name)!r} is taken for it" in caplog.text
    shutil.rmtree(elsewhere / photos.name)
    gone = rf"^'{photos}', the run's folder of images, is not there: put it back, or go to where folder:photos is$"
    for look in (same_images, evaluation_parts):
        with pytest.raises(DataError, match=gone):
            look(config, run)
