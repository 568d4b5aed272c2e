"""Images decoded once are the same images."""

import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from outcomes import break_inside
from torch_emc2.data import ArrayImages, BadImageError, FileImages, ImageDataset, decode_image, decoded_once
from torch_emc2.data import decoded as module
from torch_emc2.settings.images import Decoding


@pytest.fixture
def images(tmp_path):
    """Four files, of several sizes; the second is transparent."""
    generator = torch.Generator().manual_seed(0)
    for i, (height, width) in enumerate([(9, 12), (12, 9), (20, 20), (16, 16)]):
        pixels = torch.randint(256, (height, width, 4 if i == 1 else 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    return ImageDataset(FileImages([str(tmp_path / f"{i}.png") for i in range(4)]), labels=torch.arange(4))


def _file(folder):
    return next(folder.glob("*.pixels"))


def test_pixels_paths_and_labels_are_those_of_the_files(images, tmp_path):
    some = images.subset(torch.tensor([3, 1, 0])).decoded(Decoding(background="red"))
    once = decoded_once(some, folder=tmp_path / "kept", num_workers=1)
    for i, row in enumerate((3, 1, 0)):
        assert torch.equal(once.image(i), decode_image(images.path(row), Decoding(background="red")))
        assert once.path(i) == images.path(row)
    assert once.labels.tolist() == [3, 1, 0]
    grey = decoded_once(some.converted(1), folder=tmp_path / "kept")
    assert all(torch.equal(grey.image(i), some.converted(1).image(i)) for i in range(3))
    once.image(0).zero_()  # it is a copy
    assert once.image(0).any()
    pickled = pickle.dumps(once)
    assert torch.equal(pickle.loads(pickled).image(1), once.image(1))
    assert len(pickled) < 3000


def test_a_files_name_may_be_no_text(tmp_path):
    """Linux has names of any bytes."""
    file = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Image.new("RGB", (4, 4), "red").save(file)
    once = decoded_once(ImageDataset(FileImages([file])), folder=tmp_path / "kept")
    assert once.path(0) == file
    assert torch.equal(once.image(0), decode_image(file))


def test_it_is_made_once_for_the_same_files(images, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    decoded_once(images, folder=folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", lambda *_: pytest.fail("it is there"))
        decoded_once(images, folder=folder)
    decoded_once(images.converted(1), folder=folder)
    decoded_once(images.decoded(Decoding(background="red")), folder=folder)
    decoded_once(images.subset(torch.arange(3)), folder=folder)
    os.utime(images.path(0), (0, 0))
    decoded_once(images, folder=folder)
    assert len(list(folder.glob("*.pixels"))) == 5


def test_a_file_that_is_cut_short_is_made_again(images, tmp_path):
    folder = tmp_path / "kept"
    decoded_once(images, folder=folder)
    whole = _file(folder).read_bytes()
    for damaged in (_file(folder), _file(folder).with_suffix(".json")):
        os.truncate(damaged, 100)
        assert torch.equal(decoded_once(images, folder=folder).image(3), images.image(3))
        assert _file(folder).read_bytes() == whole


@pytest.mark.parametrize(
    ("shrink_to", "pixels"), [(None, 9 * 12 + 12 * 9 + 20 * 20 + 16 * 16), (9, 9 * 12 + 12 * 9 + 9 * 9 + 9 * 9)]
)
def test_without_room_they_are_decoded_each_time(images, tmp_path, monkeypatch, caplog, shrink_to, pixels):
    images, needed = images.decoded(Decoding(shrink_to=shrink_to)), 3 * pixels
    caplog.set_level("INFO", "torch_emc2")
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        assert (decoded_once(images, folder=tmp_path / "kept") is not images) == fits
    (line,) = caplog.messages
    assert line.startswith("4 images take 0.00 GB decoded, ")
    assert _file(tmp_path / "kept").stat().st_size == needed


def test_unreadable_ones_are_named(images, tmp_path):
    break_inside(tmp_path / "2.png")
    folder = tmp_path / "kept"
    for _ in range(2):  # made, and opened
        with pytest.raises(BadImageError, match=r"2\.png"):
            decoded_once(images, folder=folder)
        once = decoded_once(images, folder=folder, on_bad_image="skip")
        assert torch.equal(once.image(3), images.image(3))
        with pytest.raises(BadImageError, match=r"2\.png"):
            once.image(2)


def test_images_in_memory_stay_there(tmp_path):
    images = ImageDataset(ArrayImages(torch.zeros(2, 1, 3, 3, dtype=torch.uint8)))
    assert decoded_once(images, folder=tmp_path / "kept") is images
