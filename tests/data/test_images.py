import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

from torch_emc2.data import ArrayImages, BadImageError, DataError, FileImages, ImageDataset
from torch_emc2.data.images import RecordImages, decode_image


def test_rgb_png_is_read_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(decode_image(tmp_path / "a.png"), torch.from_numpy(pixels.transpose(2, 0, 1)))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 128, 129, 257 * 100, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = torch.tensor([[0, 0, 1, 100, 128, 255]], dtype=torch.uint8)  # round(v * 255 / 65535)
    assert torch.equal(decode_image(tmp_path / "a.png"), expected.expand(3, 1, 6))
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "a.tif")
    assert torch.equal(decode_image(tmp_path / "a.tif"), expected.expand(3, 1, 6))


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", (40, 0), (40, 40, 40)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, color, expected):
    Image.new(mode, (4, 3), color).save(tmp_path / "a.png")
    assert torch.equal(
        decode_image(tmp_path / "a.png"), torch.tensor(expected, dtype=torch.uint8).view(3, 1, 1).expand(3, 3, 4)
    )


def test_palette_and_cmyk(tmp_path):
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "p.png")
    assert decode_image(tmp_path / "p.png")[:, 0, 0].tolist() == [9, 8, 7]
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "c.jpg", quality=100)
    red, green, blue = decode_image(tmp_path / "c.jpg")[:, 8, 8].tolist()  # cyan ink reflects all but red
    assert (red, green, blue) == pytest.approx((0, 255, 255), abs=2)


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 255  # right half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = decode_image(tmp_path / "a.jpg")
    assert image.shape == (3, 32, 16)
    assert image[:, :12].max() < 10  # what was left is on top
    assert image[:, 20:].min() > 245


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("#ff0000", "#0000ff")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


def _png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _bad_files(folder):
    """Files that are no images, by name."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    (folder / "whole.jpg").unlink()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "überraschung 猫.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    os.symlink(folder / "gone.png", folder / "broken.png")
    bomb = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", bomb) + _png_chunk(b"IDAT", b""))
    Image.fromarray(np.ones((3, 3), dtype=np.float32)).save(folder / "float.tif")
    return sorted(file for file in folder.iterdir())


def test_bad_files_raise_one_line_that_names_them(tmp_path):
    for file in _bad_files(tmp_path):
        with pytest.raises(BadImageError) as caught:
            decode_image(file)
        assert file.name in str(caught.value)
        assert "\n" not in str(caught.value)


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


def test_wrong_arguments():
    images = ArrayImages(torch.zeros(2, 1, 3, 3, dtype=torch.uint8))
    with pytest.raises(DataError, match="2 images but 3 labels"):
        ImageDataset(images, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="got 2"):
        ImageDataset(images, channels=2)
    with pytest.raises(DataError, match=r"float32 of shape \(2, 3, 4, 4\)"):
        ArrayImages(torch.zeros(2, 3, 4, 4))
