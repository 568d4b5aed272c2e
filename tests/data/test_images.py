import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

from torch_emc2.data import ArrayImages, BadImageError, DataError, FileImages, ImageDataset, identity
from torch_emc2.data.images import RecordImages
from torch_emc2.settings.images import Decoding


def test_error_of_a_worker_stays_one_line():
    try:
        raise BadImageError("cannot read image 'Error: x.png'")
    except BadImageError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(BadImageError) as caught:
        wrapped.reraise()
    assert str(caught.value) == "cannot read image 'Error: x.png'"


def test_record_file_is_stored_by_columns(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 96), dtype=np.uint8)
    (tmp_path / "x.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
    source = pickle.loads(pickle.dumps(RecordImages(tmp_path / "x.bin", 96)))
    assert len(source) == 4
    for row in (3, 0, 2):
        assert torch.equal(source.read(row), torch.from_numpy(images[row]))
    (tmp_path / "x.bin").write_bytes(b"0" * 27649)
    with pytest.raises(DataError, match="cut short"):
        RecordImages(tmp_path / "x.bin", 96)


def test_grey_is_pillows(tmp_path):
    rgb = torch.randint(0, 256, (1, 3, 50, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = ImageDataset(ArrayImages(rgb), channels=1).image(0)
    pillow = np.asarray(Image.fromarray(rgb[0].permute(1, 2, 0).numpy()).convert("L"))
    assert torch.equal(grey[0], torch.from_numpy(pillow.copy()))


def test_grey_to_rgb_and_back_is_exact():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    rgb = ImageDataset(ArrayImages(values), channels=3).image(0)
    assert torch.equal(rgb, values[0].expand(3, 16, 16))
    assert torch.equal(ImageDataset(ArrayImages(rgb[None]), channels=1).image(0), values[0])


def test_subset_keeps_images_labels_and_paths_together(tmp_path):
    names = [str(tmp_path / f"{value}.png") for value in range(5)]
    for value, name in enumerate(names):
        Image.new("L", (2, 2), value).save(name)
    dataset = ImageDataset(FileImages(names), labels=torch.arange(5), classes=list("abcde"))
    part = dataset.subset(torch.tensor([4, 1, 3])).subset(torch.tensor([2, 0]))
    assert [part.path(i) for i in range(2)] == [names[3], names[4]]
    assert part.labels.tolist() == [3, 4]
    assert [int(part.image(i)[0, 0, 0]) for i in range(2)] == [3, 4]


def test_without_files_is_as_if_they_were_not_there(tmp_path):
    names = [str(tmp_path / f"{value}.png") for value in range(5)]
    for value, name in enumerate(names):
        Image.new("L", (2, 2), value).save(name)
    dataset = ImageDataset(FileImages(names), labels=torch.arange(5), classes=list("abcde"))
    less = dataset.without({names[1], names[3], "elsewhere"})
    assert [less.path(i) for i in range(len(less))] == [names[0], names[2], names[4]]
    assert less.labels.tolist() == [0, 2, 4]
    assert [int(less.image(i)[0, 0, 0]) for i in range(3)] == [0, 2, 4]
    assert dataset.without(set()) is dataset
    for name in (names[1], names[3]):
        os.unlink(name)
    others = [names[0], names[2], names[4]]
    assert identity(less) == identity(ImageDataset(FileImages(others), labels=torch.tensor([0, 2, 4])))


def test_another_decoding_is_that_of_other_images(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    white = ImageDataset(FileImages([str(tmp_path / "clear.png")]), labels=torch.tensor([0]), classes=["x"])
    black = white.decoded(Decoding(background="black"))
    assert [int(images.image(0).max()) for images in (white, black)] == [255, 0]
    assert (black.files(), black.labels.tolist(), black.classes) == (white.files(), [0], ["x"])
    arrays = ImageDataset(ArrayImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)))
    assert arrays.decoded(Decoding(background="black")) is arrays
    assert (arrays.files(), arrays.decoding) == ([], None)


def test_wrong_arguments():
    images = ArrayImages(torch.zeros(2, 1, 3, 3, dtype=torch.uint8))
    with pytest.raises(DataError, match="2 images but 3 labels"):
        ImageDataset(images, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="got 2"):
        ImageDataset(images, channels=2)
    with pytest.raises(DataError, match=r"float32 of shape \(2, 3, 4, 4\)"):
        ArrayImages(torch.zeros(2, 3, 4, 4))
