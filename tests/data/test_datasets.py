import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from torch_emc2.data import DataError, datasets, open_dataset, open_splits, read_folder
from torch_emc2.settings.images import Decoding


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(url, *args, **kwargs):
        raise OSError(f"no network for {url}")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", refuse)
    monkeypatch.setattr(datasets, "_DEBIAN_FASHION_MNIST", Path("/nowhere"))


def _one_line_error(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        open_dataset(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits(tmp_path):
    bunch = load_digits()
    probe, test = (open_dataset("digits", split, tmp_path) for split in ("probe", "test"))
    assert (len(probe), len(test)) == (1437, 360)
    assert sorted(torch.cat([probe.rows, test.rows]).tolist()) == list(range(1797))
    for dataset in (probe, test):
        assert torch.equal(dataset.labels, torch.from_numpy(bunch.target)[dataset.rows])
    shares = torch.bincount(test.labels) / torch.from_numpy(np.bincount(bunch.target))
    assert shares.sub(0.2).abs().max() < 0.01
    row = int(test.rows[7])
    assert np.array_equal(test.image(7)[0].numpy(), np.rint(bunch.images[row] * 255 / 16))
    assert torch.equal(open_dataset("digits", "train", tmp_path).rows, probe.rows)
    assert test.classes == list("0123456789")
    assert test.path(0) is None


def test_limit_is_a_seeded_subset_of_train_only(tmp_path):
    whole = set(open_dataset("digits", "train", tmp_path).rows.tolist())
    picks = [set(open_dataset("digits", "train", tmp_path, limit=50, seed=s).rows.tolist()) for s in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert len(picks[0]) == 50
    assert picks[0] < whole
    assert len(open_dataset("digits", "test", tmp_path, limit=50)) == 360
    assert len(open_dataset("digits", "train", tmp_path, limit=10**6)) == 1437


def test_channels(tmp_path):
    grey, rgb = (open_dataset("digits", "test", tmp_path, channels=c) for c in (None, 3))
    assert torch.equal(rgb.image(0), grey.image(0).expand(3, 8, 8))


def test_unknown_names(tmp_path):
    assert "fashion-mnist" in _one_line_error("fashion", "train", tmp_path)
    assert "probe" in _one_line_error("digits", "val", tmp_path)
    assert "got 1" in _one_line_error("digits", "train", tmp_path, limit=1)


# --- Fashion-MNIST ----------------------------------------------------------------------------------------------------


def _idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def _write_fashion_mnist(folder, suffix):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pack = gzip.compress if suffix else bytes
    written = {}
    for part, count in (("train", 6), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(_idx(images)))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(_idx(labels)))
        written[part] = images, labels
    return written


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("debian", [False, True])
def test_fashion_mnist(tmp_path, monkeypatch, suffix, debian):
    folder = tmp_path / "debian" if debian else tmp_path / "FashionMNIST" / "raw"
    monkeypatch.setattr(datasets, "_DEBIAN_FASHION_MNIST", tmp_path / "debian")
    written = _write_fashion_mnist(folder, suffix)
    for split, part in (("train", "train"), ("probe", "train"), ("test", "t10k")):
        dataset = open_dataset("fashion-mnist", split, tmp_path)
        images, labels = written[part]
        assert np.array_equal(torch.stack([dataset.image(i) for i in range(len(dataset))])[:, 0].numpy(), images)
        assert dataset.labels.tolist() == labels.tolist()
    assert dataset.classes[9] == "Ankle boot"


@pytest.mark.parametrize("data", [b"", b"\0\0\x08\x03\0\0", _idx(np.zeros((2, 28, 28), np.uint8))[:-1], b"<html>"])
def test_damaged_fashion_mnist(tmp_path, data):
    folder = tmp_path / "FashionMNIST" / "raw"
    _write_fashion_mnist(folder, "")
    (folder / "train-images-idx3-ubyte").write_bytes(data)
    assert "train-images-idx3-ubyte' is damaged" in _one_line_error("fashion-mnist", "train", tmp_path)


def test_damaged_gzip(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    _write_fashion_mnist(folder, ".gz")
    file = folder / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-3])
    assert "is damaged" in _one_line_error("fashion-mnist", "test", tmp_path)


# --- CIFAR-10 and STL-10 ----------------------------------------------------------------------------------------------


def test_cifar10(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    pixels = {
        name: rng.integers(0, 256, (3, 3072), np.uint8) for name in ("data_batch_1", "data_batch_2", "test_batch")
    }
    listed = [write(name, {"data": data, "labels": [1, 2, 3]}) for name, data in pixels.items()]
    meta = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", listed[:2])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", listed[2:])
    meta = {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    train, test = (open_dataset("cifar10", split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 3)
    assert np.array_equal(train.image(4).numpy(), pixels["data_batch_2"][1].reshape(3, 32, 32))
    assert np.array_equal(test.image(2).numpy(), pixels["test_batch"][2].reshape(3, 32, 32))
    assert train.labels.tolist() == [1, 2, 3] * 2
    assert test.classes[3] == "class 3"


def test_stl10(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 256, (3, 3, 96, 96), np.uint8) for part in ("unlabeled", "train", "test")}
    for part, pixels in images.items():
        (folder / f"{part}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
    for part in ("train", "test"):
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 10, 2]))
    for split, part in (("train", "unlabeled"), ("probe", "train"), ("test", "test")):
        dataset = open_dataset("stl10", split, tmp_path)
        assert np.array_equal(torch.stack([dataset.image(i) for i in range(3)]).numpy(), images[part])
        assert split == "train" or dataset.labels.tolist() == [0, 9, 1]
    assert open_dataset("stl10", "train", tmp_path).labels is None
    assert dataset.classes[9] == "truck"


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "stl10"])
def test_missing_data_says_what_to_put_where(tmp_path, name):
    message = _one_line_error(name, "train", tmp_path)
    assert str(tmp_path) in message
    assert "no network" in message
    assert "put them there" in message or "unpack" in message
    assert [file for file in tmp_path.rglob("*") if file.is_file() or file.name.startswith(".")] == []


def test_download_appears_only_when_whole(tmp_path):
    def half(target):
        (Path(target) / "set").mkdir()
        (Path(target) / "set" / "a.bin").write_bytes(b"a")
        raise RuntimeError("File not found\nor corrupted.")

    with pytest.raises(DataError, match=r"what to do \(the download failed: RuntimeError: File not found or corrupted"):
        datasets._download(half, Path("set"), tmp_path, "what to do")
    assert list(tmp_path.iterdir()) == []

    def whole(target):
        (Path(target) / "set").mkdir()
        (Path(target) / "set" / "a.bin").write_bytes(b"a")

    datasets._download(whole, Path("set"), tmp_path / "new", "what to do")
    assert [file.name for file in (tmp_path / "new").rglob("*")] == ["set", "a.bin"]


# --- trees of files ---------------------------------------------------------------------------------------------------


def _images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(folder / name)


def test_imagenet100(tmp_path):
    wnids = datasets.files("torch_emc2.data").joinpath("imagenet100_wnids.txt").read_text().split()
    assert len(set(wnids)) == 100
    _images(tmp_path / "imagenet" / "train", *(f"{wnid}/{wnid}_{i}.JPEG" for wnid in wnids for i in range(2)))
    _images(tmp_path / "imagenet" / "train", "n00000000/other.JPEG")
    dataset = open_dataset("imagenet100", "probe", tmp_path)
    assert len(dataset) == 200
    for i in (0, 77, 199):
        assert Path(dataset.path(i)).parent.name == dataset.classes[dataset.labels[i]]
    missing = sorted(wnids)[5]
    for file in (tmp_path / "imagenet" / "train" / missing).iterdir():
        file.unlink()
    message = _one_line_error("imagenet100", "train", tmp_path)
    assert f"1 of 100 classes have no images in {str(tmp_path / 'imagenet' / 'train')!r} ({missing})" in message
    assert "100 of 100" in _one_line_error("imagenet100", "test", tmp_path)


def test_flat_folder_has_no_labels(tmp_path):
    _images(tmp_path, "b.PNG", "a.jpg", "c.gif", ".hidden.png")
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = open_dataset(f"folder:{tmp_path}", "train", Path("unused"))
    assert [Path(dataset.path(i)).name for i in range(len(dataset))] == ["a.jpg", "b.PNG", "c.gif"]
    assert dataset.labels is None
    assert dataset.classes == []
    parts = [open_dataset(f"folder:{tmp_path}", split, Path("unused")) for split in ("probe", "test")]
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == [0, 1, 2]


def test_classes_are_parent_folders_and_a_fifth_is_test(tmp_path):
    _images(tmp_path, *(f"{name}/{i}.png" for name, n in (("Ähre", 10), ("z/cat", 20), ("z/dog", 5)) for i in range(n)))
    _images(tmp_path, ".cache/thumb.png")
    train, probe, test = (open_dataset(f"folder:{tmp_path}", s, Path("unused")) for s in ("train", "probe", "test"))
    assert train.classes == probe.classes == ["z/cat", "z/dog", "Ähre"]
    assert torch.bincount(train.labels).tolist() == [20, 5, 10]
    assert torch.bincount(probe.labels).tolist() == [16, 4, 8]
    assert torch.bincount(test.labels).tolist() == [4, 1, 2]
    assert sorted(torch.cat([probe.rows, test.rows]).tolist()) == list(range(35))
    for i in range(len(test)):
        assert Path(test.path(i)).parent == tmp_path / test.classes[test.labels[i]]


def test_what_is_held_out_is_never_trained_on(tmp_path):
    _images(tmp_path, "train/b/1.png", "train/c/1.png", "Valid/a/1.png", "Valid/c/1.png", "TESTING/d/1.png")
    train, probe, test = (open_dataset(f"folder:{tmp_path}", s, Path("unused")) for s in ("train", "probe", "test"))
    assert train.classes == probe.classes == test.classes == ["b", "c", "d"]
    for part in (train, probe):
        assert [part.path(i) for i in range(len(part))] == [str(tmp_path / f"train/{name}/1.png") for name in "bc"]
        assert part.labels.tolist() == [0, 1]
    assert [test.path(i) for i in range(len(test))] == [str(tmp_path / "TESTING/d/1.png")]
    assert test.labels.tolist() == [2]


def test_a_folder_is_understood_aloud(tmp_path, caplog):
    _images(tmp_path, "1.png", "2.png")
    with caplog.at_level("INFO", "torch_emc2"):
        open_dataset(f"folder:{tmp_path}", "train", Path("unused"))
    assert caplog.messages == [str(read_folder(tmp_path))]


def test_splits_are_those_opened_one_by_one_and_a_folder_is_walked_once(tmp_path, monkeypatch):
    _images(tmp_path, *(f"{name}/{i}.png" for name in "ab" for i in range(10)))
    name, names = f"folder:{tmp_path}", ("probe", "test", "train")
    alone = [open_dataset(name, split, tmp_path, channels=1, limit=7, seed=3) for split in names]
    walked = []
    monkeypatch.setattr(datasets, "read_folder", lambda path: walked.append(path) or read_folder(path))
    together = open_splits(name, names, tmp_path, channels=1, limit=7, seed=3)
    assert walked == [tmp_path]
    for one, other in zip(alone, together, strict=True):
        assert (one.files(), one.classes, one.channels) == (other.files(), other.classes, other.channels)
        assert torch.equal(one.labels, other.labels)
    with pytest.raises(DataError, match="unknown split 'tests'; use one of train, probe, test"):
        open_splits(name, ("train", "tests"), tmp_path)


def test_files_are_decoded_as_is_said(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / name)
    dataset = open_dataset(f"folder:{tmp_path}", "train", Path("unused"), decoding=Decoding(background="#010203"))
    assert dataset.image(1)[:, 0, 0].tolist() == [1, 2, 3]


def test_flat_train_beside_labelled_test(tmp_path):
    _images(tmp_path, "train/1.png", "train/2.png", "test/a/1.png", "test/c/1.png")
    train, test = (open_dataset(f"folder:{tmp_path}", split, Path("unused")) for split in ("train", "test"))
    assert train.labels is None
    assert test.classes == ["a", "c"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60))
def test_fifth_and_the_rest_are_all_and_the_rest_has_every_class(labels):
    labels = torch.tensor(labels)
    test, rest = datasets._fifth(labels, test=True), datasets._fifth(labels, test=False)
    assert sorted(torch.cat([test, rest]).tolist()) == list(range(len(labels)))
    if len(labels.unique()) < len(labels):
        assert torch.equal(labels[rest].unique(), labels.unique())
    assert len(test) > 0


def test_a_class_of_one_image_is_never_tested(tmp_path):
    _images(tmp_path, *(f"{name}/{i}.png" for name, n in (("a", 4), ("b", 1), ("c", 1), ("d", 4)) for i in range(n)))
    probe, test = (open_dataset(f"folder:{tmp_path}", split, Path("unused")) for split in ("probe", "test"))
    assert [probe.classes[label] for label in probe.labels.unique()] == ["a", "b", "c", "d"]
    assert torch.bincount(test.labels).tolist() == [1, 0, 0, 1]


def test_where_each_class_has_one_image_a_fifth_is_held_out_all_the_same(tmp_path):
    _images(tmp_path, *(f"{i}/x.png" for i in range(10)))
    probe, test = (open_dataset(f"folder:{tmp_path}", split, Path("unused")) for split in ("probe", "test"))
    assert (len(probe), len(test)) == (8, 2)
