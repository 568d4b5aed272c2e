import json
import multiprocessing
import pickle
import shutil
import socket
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from torch_emc2.data import (
    ArrayImages,
    BadImageError,
    ContrastiveDataset,
    DataError,
    EpochSampler,
    FileImages,
    FiniteDataset,
    ImageDataset,
    RandomView,
    finite,
    finite_views,
    make_loader,
    seeded_view,
)
from torch_emc2.settings.images import Augmentation, Decoding

COUNT, VIEWS, SEED = 9, 4, 5
AUGMENTATION = Augmentation(10)


def _images(count=COUNT):
    pixels = torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(ArrayImages(pixels))


def _make(folder, images=None, augmentation=AUGMENTATION, num_views=VIEWS, **kwargs):
    kwargs = {"seed": SEED, "name": "noise"} | kwargs
    return finite_views(images or _images(), augmentation, num_views, folder=folder, **kwargs)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    return _make(tmp_path_factory.mktemp("views"))


def _expected(sample, view):
    """By the plain loop, rounded to the 256 values of a byte."""
    drawn = seeded_view(RandomView(AUGMENTATION), _images().image(sample), SEED, 0, sample, view)
    return np.floor(drawn.numpy().astype(np.float64) * 255 + 0.5).astype(np.uint8)


def _everything(views):
    return views.take(torch.arange(len(views)))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_seeded_views(views):
    stored = np.load(views.file)
    assert (stored.shape, stored.dtype) == ((COUNT, VIEWS, 3, 10, 10), np.uint8)
    for sample in range(COUNT):
        for view in range(VIEWS):
            assert np.array_equal(stored[sample, view], _expected(sample, view))
    assert (len(views), views.num_samples, views.num_views) == (COUNT * VIEWS, COUNT, VIEWS)


def test_an_id_is_sample_times_n_plus_view(views):
    got = views.take(torch.tensor([4 * 7 + 3, 0, 4 * 2 + 1]))
    assert (got.dtype, got.shape) == (torch.float32, (3, 3, 10, 10))
    for one, (sample, view) in zip(got, [(7, 3), (0, 0), (2, 1)], strict=True):
        assert np.array_equal(one.numpy(), _expected(sample, view).astype(np.float32) / np.float32(255))
    assert views.take(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 10, 10)


def test_the_file_is_the_same_each_time_and_with_workers(views, tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = [_make(tmp_path / "0"), _make(tmp_path / "2", num_workers=2)]
    assert torch.equal(torch.get_rng_state(), before)
    for other in again:
        assert other.file.name == views.file.name
        assert other.file.read_bytes() == views.file.read_bytes()


def test_it_is_made_once(tmp_path, monkeypatch):
    first = _make(tmp_path)
    monkeypatch.setattr(finite, "_make", None)
    assert torch.equal(_everything(_make(tmp_path)), _everything(first))


def test_it_has_another_name_for_all_that_its_views_depend_on(tmp_path):
    files = [_make(tmp_path).file]
    for change in (
        {"name": "other"},
        {"images": _images(10)},
        {"images": _images(10).subset(torch.arange(9))},  # the first nine of them: the same
        {"images": _images(10).subset(torch.arange(1, 10))},
        {"images": ImageDataset(_images().source, channels=1)},
        {"augmentation": Augmentation(10, flip=0.25)},
        {"num_views": 3},
        {"seed": 6},
    ):
        files.append(_make(tmp_path, **change).file)
    assert len(set(files)) == len(files) - 1
    assert files[3] == files[0]


def test_images_in_files_that_change_give_another_file(tmp_path):
    images, before = _files(tmp_path, bad=()), []
    for color in (0, 100):
        Image.new("RGB", (12, 12), (color, 0, 0)).resize((12 + color, 12)).save(tmp_path / "3.png")
        before.append(_make(tmp_path / "views", images).file)
    assert before[0] != before[1]


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _add(file):
    file.write_bytes(file.read_bytes() + b"\0")


def _other_shape(file):
    np.save(file, np.load(file)[:, :3])


def _empty(file):
    file.write_bytes(b"")


def _garbage(file):
    file.write_bytes(b"garbage" * 100)


def _no_note(file):
    file.with_suffix(".json").unlink()


def _half_a_note(file):
    note = file.with_suffix(".json")
    note.write_text(note.read_text()[:20])


@pytest.mark.parametrize("damage", [_cut, _add, _other_shape, _empty, _garbage, _no_note, _half_a_note])
def test_a_damaged_file_is_made_again(damage, views, tmp_path):
    file = _make(tmp_path).file
    damage(file)
    assert torch.equal(_everything(_make(tmp_path)), _everything(views))
    assert file.read_bytes() == views.file.read_bytes()


def test_an_interrupted_one_leaves_nothing_and_starts_anew(views, tmp_path, monkeypatch):
    draw = finite.seeded_view

    def stop(transform, image, seed, epoch, sample, view):
        if sample == 5:
            raise KeyboardInterrupt
        return draw(transform, image, seed, epoch, sample, view)

    with monkeypatch.context() as patch:
        patch.setattr(finite, "seeded_view", stop)
        with pytest.raises(KeyboardInterrupt):
            _make(tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == []
    killed = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    left = tmp_path / f".{views.file.name}.0.{killed}@{socket.gethostname()}.partial"
    left.write_bytes(b"of a killed process" * 1000)
    assert _make(tmp_path).file.read_bytes() == views.file.read_bytes()
    assert {file.suffix for file in tmp_path.iterdir()} <= {".npy", ".json", ".lock"}


def test_of_two_processes_one_makes_the_file_and_the_other_waits(views, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier, made, sums = context.Barrier(2), context.Queue(), context.Queue()
    make = finite._make

    def counted(*args):
        made.put(1)
        time.sleep(0.3)  # the other comes while there is no file
        return make(*args)

    def process():
        barrier.wait(60)
        sums.put(_everything(_make(tmp_path)).double().sum().item())

    monkeypatch.setattr(finite, "_make", counted)
    both = [context.Process(target=process, daemon=True) for _ in range(2)]
    for one in both:
        one.start()
    assert [sums.get(timeout=60) for _ in both] == [_everything(views).double().sum().item()] * 2
    for one in both:
        one.join(60)
    assert made.get(timeout=60) == 1
    assert made.empty()


def test_no_room_is_said_before_writing(tmp_path, monkeypatch):
    needed = COUNT * VIEWS * 300
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
        with pytest.raises(DataError, match=r"4 views of 9 images take 0\.00 GB.*make room"):
            _make(tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_one_view_is_no_pair(tmp_path):
    with pytest.raises(DataError, match="num_views must be at least 2, got 1"):
        _make(tmp_path, num_views=1)


def test_a_pickle_does_not_copy_the_views(views):
    pickled = pickle.dumps(views)
    assert len(pickled) < 1000 < _everything(views).numel()
    assert torch.equal(_everything(pickle.loads(pickled)), _everything(views))


# --- unreadable images ------------------------------------------------------------------------------------------------


def test_another_background_is_another_file(tmp_path):
    for i in range(2):
        Image.new("RGBA", (12, 12), (0, 0, 0, 0)).save(tmp_path / f"{i}.png")
    names = [str(tmp_path / f"{i}.png") for i in range(2)]
    white, black = (
        _make(tmp_path, ImageDataset(FileImages(names, Decoding(background=name)))) for name in ("white", "black")
    )
    assert white.file != black.file
    assert black.take(torch.tensor([0])).max() == 0 < white.take(torch.tensor([0])).min()


def _files(folder, bad):
    for i in range(6):
        Image.new("RGB", (12, 12), (40 * i, 0, 0)).save(folder / f"{i}.png")  # the first one is black, and readable
    for i in bad:
        (folder / f"{i}.png").write_bytes(b"")
    return ImageDataset(FileImages([str(folder / f"{i}.png") for i in range(6)]))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_raise_one_line_and_leave_no_file(tmp_path, workers):
    with pytest.raises(BadImageError) as caught:
        _make(tmp_path / "views", _files(tmp_path, bad=(2,)), num_workers=workers)
    assert str(caught.value).startswith(f"cannot read image {str(tmp_path / '2.png')!r}")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "views").glob("*.npy"))


def test_bad_images_are_skipped_and_counted_as_by_the_ordinary_data_set(tmp_path):
    images = _files(tmp_path, bad=(1, 4))
    views = _make(tmp_path / "views", images, on_bad_image="skip")
    for opened in (views, _make(tmp_path / "views", images, on_bad_image="skip")):
        finite_batch = FiniteDataset(opened, seed=0).__getitems__([(0, i) for i in range(6)])
        ordinary = ContrastiveDataset(images, RandomView(AUGMENTATION), seed=0, on_bad_image="skip")
        batch = ordinary.__getitems__([(0, i) for i in range(6)])
        assert (finite_batch.index[:, 0] // VIEWS).tolist() == batch.index.tolist() == [0, 2, 3, 5]
        assert finite_batch.skipped == batch.skipped == 2
        with pytest.raises(DataError, match=r"1 of the 2 images .*4\.png"):
            FiniteDataset(opened, seed=0).__getitems__([(0, 0), (0, 4)])
        with pytest.raises(BadImageError, match=r"4\.png"):
            opened.take(torch.tensor([0, 4 * VIEWS]))
    assert set(json.loads(views.file.with_suffix(".json").read_text())["unreadable"]) == {"1", "4"}
    with pytest.raises(BadImageError, match=r"1\.png"):  # the file is there, but not what is asked for
        _make(tmp_path / "views", images)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_two_views_of_its_samples_and_the_carried_ones(views):
    carried_ids = torch.randint(-1, len(views), (len(views), 2), generator=torch.Generator().manual_seed(1)).int()
    dataset = FiniteDataset(views, seed=3, carried_ids=carried_ids)
    batch = dataset.__getitems__([(2, 8), (2, 0), (2, 5)])
    assert (batch.index.shape, batch.index.dtype) == ((3, 2), torch.int64)
    assert (batch.index // VIEWS).tolist() == [[8, 8], [0, 0], [5, 5]]
    assert (batch.epoch, batch.skipped) == (2, 0)
    stored = np.load(views.file).reshape(-1, 3, 10, 10)
    for got, ids in ((batch.first, batch.index[:, 0]), (batch.second, batch.index[:, 1])):
        assert np.array_equal(got.numpy() * 255, stored[ids])
    wanted = sorted({int(i) for i in carried_ids[batch.index].flatten()} - {-1})
    assert batch.carried_ids.tolist() == wanted
    assert np.array_equal(batch.carried.numpy() * 255, stored[wanted])
    assert torch.equal(dataset.encode_inputs(7, batch.carried_ids), batch.carried)
    nothing = FiniteDataset(views, seed=3).__getitems__([(0, 1), (0, 2)])
    assert (nothing.carried_ids.shape, nothing.carried.shape) == ((0,), (0, 3, 10, 10))


@pytest.mark.parametrize("num_views", [2, 4])
def test_every_pair_of_different_views_comes_equally_often(num_views, tmp_path):
    dataset = FiniteDataset(_make(tmp_path, num_views=num_views), seed=3)
    counts = torch.zeros(num_views, num_views)
    epochs = 400
    for epoch in range(epochs):
        index = dataset.__getitems__([(epoch, sample) for sample in range(COUNT)]).index
        assert (index // num_views).tolist() == [[sample, sample] for sample in range(COUNT)]
        counts += torch.zeros_like(counts).index_put_(tuple(index.T % num_views), torch.ones(()), accumulate=True)
    assert counts.diagonal().sum() == 0
    p = 1 / (num_views * (num_views - 1))
    frequencies = counts[~torch.eye(num_views, dtype=torch.bool)] / (epochs * COUNT)
    assert (frequencies - p).abs().max() < 5 * (p * (1 - p) / (epochs * COUNT)) ** 0.5


def test_the_two_depend_on_seed_epoch_and_sample_alone(views):
    def index(seed, epoch, samples):
        return FiniteDataset(views, seed=seed).__getitems__([(epoch, i) for i in samples]).index.tolist()

    whole = index(3, 1, range(COUNT))
    assert index(3, 1, [6, 2]) == [whole[6], whole[2]]
    assert whole != index(3, 2, range(COUNT))
    assert whole != index(4, 1, range(COUNT))


def test_workers_see_the_chains_of_the_training_process(views):
    batches = {}
    for workers in (0, 2):
        carried_ids = torch.full((len(views), 1), -1, dtype=torch.int32)
        sampler = EpochSampler(COUNT, 3, seed=5)
        loader = make_loader(FiniteDataset(views, seed=3, carried_ids=carried_ids), sampler, 3, workers)
        batches[workers] = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for batch in loader:
                batches[workers].append(batch)
                carried_ids[batch.index.flatten()] = ((batch.index.flatten()[:, None] + VIEWS) % len(views)).int()
    for ours, theirs in zip(batches[0], batches[2], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert sum(len(batch.carried_ids) for batch in batches[2]) > 0


def test_chains_are_one_a_view(views):
    with pytest.raises(DataError, match="9 rows for 36 views"):
        FiniteDataset(views, seed=0, carried_ids=torch.zeros(COUNT, 1))
