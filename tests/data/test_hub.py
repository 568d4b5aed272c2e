"""What Hugging Face's `datasets` loads, against the images that were put into it."""

from __future__ import annotations

import io
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from torch_emc2.config import Config, read_config
from torch_emc2.data import DataError, finite_views, identity, open_dataset, open_splits
from torch_emc2.data.hub import read_hub
from torch_emc2.settings.images import Augmentation, Decoding, file_name_of
from torch_emc2.training import train

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 9, 11, 3), np.uint8)
    return [Image.fromarray(each) for each in pixels]


def table(images: list[Any], **columns: Any) -> Any:
    features = {name: datasets.ClassLabel(names=["cat", "dog"]) for name in columns}
    content = {"note": ["x"] * len(images), "image": images, **columns}
    types = datasets.Features({"note": datasets.Value("string"), "image": datasets.Image(), **features})
    return datasets.Dataset.from_dict(content, features=types)


def saved(folder: Path, data: Any) -> str:
    data.save_to_disk(folder)
    return f"hf:{folder}"


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_splits_classes_and_pixels(tmp_path: Path) -> None:
    first, second, third = pictures(6), pictures(4, seed=1), pictures(2, seed=2)
    parts = {"Train": table(first, kind=[0, 1, 1, 0, 1, 0]), "test": table(second, kind=[1, 0, 0, 1])}
    name = saved(tmp_path / "saved", datasets.DatasetDict({**parts, "unsupervised": table(third, kind=[-1, -1])}))
    train, probe, test = open_splits(name, ("train", "probe", "test"), tmp_path)
    for dataset, images in ((train, first), (probe, first), (test, second)):
        assert len(dataset) == len(images)
        assert all(torch.equal(dataset.image(i), pixels_of(image)) for i, image in enumerate(images))
        assert dataset.classes == ["cat", "dog"]
        assert dataset.files() == []
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 1, 0, 1, 0]
    assert str(read_hub(name)) == (
        f"{name}: 6 training images, 2 classes. Held out, to test on: 4. Left out: 'unsupervised'."
    )
    again = pickle.loads(pickle.dumps(train))  # as a loader's workers are given it
    assert torch.equal(again.image(3), train.image(3))


def test_a_part_that_has_labels_tests_before_one_that_has_none(tmp_path: Path) -> None:
    secret, open_ = table(pictures(4), kind=[-1, -1, None, -1]), table(pictures(3), kind=[0, 1, 0])
    parts = {"train": table(pictures(6), kind=[0, 1] * 3), "test": secret, "validation": open_}
    name = saved(tmp_path / "saved", datasets.DatasetDict(parts))
    (test,) = open_splits(name, ("test",), tmp_path)
    assert test.labels is not None
    assert test.labels.tolist() == [0, 1, 0]
    assert str(read_hub(name)).endswith("Left out: 'test'.")
    del parts["validation"]
    (test,) = open_splits(saved(tmp_path / "other", datasets.DatasetDict(parts)), ("test",), tmp_path)
    assert (len(test), test.labels) == (4, None)


def test_what_is_kept_of_other_data_or_another_decoding_is_not_used(tmp_path: Path) -> None:
    """Views drawn once: of one changed image among many, and on another background."""
    clear = [Image.new("RGBA", (9, 9), (0, 0, 0, 0)) for _ in range(5)]
    other = [*clear[:3], Image.new("RGBA", (9, 9), (255, 0, 0, 255)), clear[4]]
    one, changed = saved(tmp_path / "one", table(clear)), saved(tmp_path / "changed", table(other))

    def first_view(name: str, background: str, row: int) -> Tensor:
        images = open_dataset(name, "train", tmp_path, decoding=Decoding(background=background))
        augmentation = Augmentation(4, jitter_p=0, grey_p=0, blur_p=0)
        views = finite_views(images, augmentation, 2, seed=0, folder=tmp_path / "kept", name="same")
        return views.take(torch.tensor([2 * row]))[0]

    assert first_view(one, "#000000", 3).max() == 0
    assert first_view(one, "#ffffff", 3).min() == 1
    assert first_view(changed, "#000000", 3)[0].min() == 1
    assert identity(open_dataset(one, "train", tmp_path)) != identity(open_dataset(changed, "train", tmp_path))
    assert identity(open_dataset(one, "train", tmp_path)) == identity(open_dataset(one, "train", tmp_path))


def test_without_a_part_to_test_on_a_fifth_of_each_class_is_held_out(tmp_path: Path) -> None:
    name = saved(tmp_path / "saved", table(pictures(20), kind=[0, 1] * 10))
    train, probe, test = open_splits(name, ("train", "probe", "test"), tmp_path)
    assert len(train) == 20
    assert sorted([*probe.rows.tolist(), *test.rows.tolist()]) == list(range(20))
    assert test.labels is not None
    assert torch.bincount(test.labels).tolist() == [2, 2]


@pytest.mark.parametrize("labels", [None, [0, -1, 1]])
def test_without_labels(tmp_path: Path, labels: list[int] | None) -> None:
    columns = {} if labels is None else {"kind": labels}
    train = open_dataset(saved(tmp_path / "saved", table(pictures(3), **columns)), "train", tmp_path)
    assert train.labels is None
    assert train.classes == []


def test_a_folder_that_the_library_understands(tmp_path: Path) -> None:
    images = pictures(3)
    for part in ("train", "validation"):
        for i, image in enumerate(images):
            (tmp_path / "tree" / part / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "tree" / part / "ab"[i % 2] / f"{i}.png")
    train, test = open_splits(f"hf:{tmp_path / 'tree'}", ("train", "test"), tmp_path)
    assert train.classes == test.classes == ["a", "b"]
    found = {tuple(train.image(i).flatten().tolist()) for i in range(3)}
    assert found == {tuple(pixels_of(image).flatten().tolist()) for image in images}


def test_pixels_are_decoded_as_those_of_files(tmp_path: Path) -> None:
    """Transparency on the background, values deeper than 8 bits in the given range."""
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    deep = Image.fromarray(np.array([[0, 4095], [2048, 1024]], np.uint16))
    name = saved(tmp_path / "saved", table([clear, deep]))
    dataset = open_dataset(name, "train", tmp_path, decoding=Decoding(background="#102030", value_range="0,4095"))
    assert dataset.image(0)[:, 0, 0].tolist() == [0x10, 0x20, 0x30]
    assert dataset.image(1)[0].flatten().tolist() == [0, 255, 128, 64]
    with pytest.raises(DataError, match=r"cannot read image 1 of hf:.* have no known range: value_range gives one"):
        open_dataset(name, "train", tmp_path).image(1)


def test_what_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = saved(tmp_path / "texts", datasets.Dataset.from_dict({"text": ["a", "b"]}))
    with pytest.raises(DataError, match="has no images: its columns are text"):
        read_hub(texts)
    two = saved(tmp_path / "two", datasets.DatasetDict({"test": table(pictures(2)), "extra": table(pictures(2))}))
    with pytest.raises(DataError, match="has the splits 'test', 'extra': one must be called train"):
        read_hub(two)
    with pytest.raises(DataError, match="hf:/nowhere/at/all cannot be loaded"):
        read_hub("hf:/nowhere/at/all")
    content = io.BytesIO()
    pictures(1)[0].save(content, "png")
    whole = content.getvalue()
    broken = open_dataset(saved(tmp_path / "broken", table([{"bytes": whole[:60], "path": None}])), "train", tmp_path)
    with pytest.raises(DataError, match=r"cannot read image 0 of hf:.*leave it out of the data") as caught:
        broken.image(0)
    assert "\n" not in str(caught.value)
    gap = open_dataset(saved(tmp_path / "gap", table([None, *pictures(1)])), "train", tmp_path)
    with pytest.raises(DataError, match=r"cannot read image 0 of hf:.* \(there is none\)"):
        gap.image(0)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="python -m pip install datasets"):
        read_hub(two)


def run_on(name: str, out: Path, *fields: str) -> Config:
    words = f"--data.name {name} --data.augmentation.size 8 --batch_size 8 --epochs 1 --accelerator cpu".split()
    return read_config("quickstart", [*words, "--out", str(out), *fields])


def test_a_run_goes_on_with_the_same_data_and_with_no_other(tmp_path: Path) -> None:
    content = {"kind": [0, 1] * 10}
    name = saved(tmp_path / "data", table(pictures(20), **content))
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(run_on(name, run, "--data.num_workers", "1"))
    train(run_on(name, run, "--epochs", "2"), resume=True)
    train(run_on(name, whole, "--epochs", "1"))
    weights = [
        load_file(each / "encoder-1-epochs.safetensors" if each is run else each / "encoder.safetensors")
        for each in (run, whole)
    ]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    shutil.rmtree(tmp_path / "data")
    saved(tmp_path / "data", table(pictures(20, seed=3), **content))
    with pytest.raises(ValueError, match="with the very images that it began with: move away what was added"):
        train(run_on(name, run, "--epochs", "3"), resume=True)


def test_files_on_data_sets_have_names_of_their_own(tmp_path: Path) -> None:
    names = [f"folder:{tmp_path}", f"hf:{tmp_path}/", "hf:me/cats", "hf:you/cats", f"folder:{tmp_path / 'x' / '..'}"]
    short = [file_name_of(name) for name in names]
    assert short[0] == short[4] == short[1]
    assert len(set(short)) == 3
    assert all(re.fullmatch(r"[\w.-]+-[0-9a-f]{6}", name) for name in short)
    assert file_name_of("digits") == "digits"
