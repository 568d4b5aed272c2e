"""Embedding from Python, against the encoder by hand."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import torch_emc2
from torch_emc2.data import BadImageError, DataError
from torch_emc2.models import load_encoder
from torch_emc2.runs import Model


@pytest.fixture(scope="module")
def model(finished: Path) -> Model:
    return torch_emc2.load(str(finished), device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colour images of 8 x 8 pixels, which the model, of grey ones of that size, has only to make grey."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in ("b", "a", "c"):
        pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def by_hand(run: Path, image: Image.Image) -> torch.Tensor:
    grey = torch.from_numpy(np.asarray(image.convert("L")).copy())
    with torch.no_grad():
        return load_encoder(run).features(grey[None, None] / 255)[0]


def test_rows_are_features_in_the_order_given_whatever_is_given(model: Model, images: Path) -> None:
    b, a, c = (images / f"{name}.png" for name in "bac")
    opened = Image.open(b)
    pixels = np.asarray(Image.open(c))[..., ::-1].transpose(2, 0, 1)[::-1]  # whose strides are negative
    got = model.embed([b, opened, str(a), torch.from_numpy(pixels.copy()), pixels, images, np.stack([pixels, pixels])])
    expected = torch.stack([by_hand(model.run, Image.open(images / f"{name}.png")) for name in "bbaccabccc"])
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)
    assert (got.dtype, got.device.type, got.requires_grad) == (torch.float32, "cpu", False)
    torch.testing.assert_close(model.embed(images, batch_size=2), got[[2, 0, 3]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.embed(b), got[:1], rtol=1e-4, atol=1e-5)
    unit = model.embed(images, normalize=True)
    torch.testing.assert_close(unit.square().sum(1), torch.ones(3))
    torch.testing.assert_close(unit[0] * got[2].norm(), got[2], rtol=1e-4, atol=1e-5)
    assert opened.mode == "RGB"
    assert not any(module.training for module in model.encoder.modules())


def png(file: Path, bits: int, colour: int, rows: np.ndarray, **chunks: bytes) -> None:
    """Write a PNG of 8 x 8 pixels, which Pillow does not in all kinds."""
    header = struct.pack(">IIBBBBB", 8, 8, bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    with file.open("wb") as out:
        out.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in {"IHDR": header, **chunks, "IDAT": zlib.compress(lines), "IEND": b""}.items():
            body = kind.encode() + data
            out.write(struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body)))


def test_images_of_pillow_are_what_their_files_are(model: Model, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    clear = Image.fromarray(generator.integers(0, 256, (8, 8, 4), dtype=np.uint8), "RGBA")
    turned = Image.fromarray(generator.integers(0, 256, (9, 8, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x112] = 6  # to be turned by a quarter
    clear.save(tmp_path / "clear.png")
    turned.save(tmp_path / "turned.tif", exif=exif)
    Image.fromarray(generator.integers(0, 65536, (8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    # What only the file tells: 16 bits a colour, and that the transparent grey is of two bits.
    colours = np.full((8, 8, 3), 40_000, ">u2")
    png(tmp_path / "colours.png", 16, 2, colours.reshape(8, -1).view(np.uint8))
    png(tmp_path / "grey.png", 2, 0, np.full((8, 2), 0b11_10_01_00, np.uint8), tRNS=b"\x00\x02")
    files = sorted(tmp_path.iterdir())
    torch.testing.assert_close(model.embed([Image.open(file) for file in files]), model.embed(files))


def test_the_range_of_deep_values_can_be_given(finished: Path, model: Model, tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(BadImageError, match=r"deep\.tif.*value_range=0,4095"):
        model.embed(tmp_path)
    ranged = Model(finished, device="cpu", value_range="0,4095")
    plain = Image.fromarray(np.rint(values * (255 / 4095)).astype(np.uint8))
    torch.testing.assert_close(ranged.embed(tmp_path), model.embed(plain))


def test_what_is_no_image_is_named(model: Model, images: Path, tmp_path: Path) -> None:
    fine = images / "a.png"
    wrong = {
        r"images\[1\] is float32 of shape \(3, 8, 8\): give uint8": [fine, torch.zeros(3, 8, 8)],
        r"images is uint8 of shape \(8, 8, 3\): .* Image.fromarray": np.zeros((8, 8, 3), np.uint8),
        r"images\[0\] is of type int: give a path": [3],
        r"there is no '.*nowhere'": [tmp_path / "nowhere"],
        "no images in '.*': give images, or folders that hold some": tmp_path,
        "no images: give files": [],
    }
    for message, given in wrong.items():
        with pytest.raises(DataError, match=message):
            model.embed(given)  # type: ignore[arg-type]
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"1 image cannot be read: .*bad\.png' \(empty\): mend or remove"):
        model.embed([fine, tmp_path])
    left = model.images([tmp_path, fine], on_bad_image="skip")
    assert left.files() == [str(fine)]
    content = bytearray(fine.read_bytes())
    content[45:-20] = bytes(len(content) - 65)  # a header and an end, and nothing between
    (tmp_path / "hollow.png").write_bytes(content)
    assert model.images([tmp_path, fine], on_bad_image="skip").files() == [str(fine)]
    (tmp_path / "hollow.png").unlink()
    with pytest.raises(ValueError, match="on_bad_image must be 'raise' or 'skip', got 'ignore'"):
        model.images(fine, on_bad_image="ignore")  # type: ignore[arg-type]
    torch.testing.assert_close(model.features(left), model.embed(fine))
    with pytest.raises(DataError, match=r"none of the images can be read: .*bad\.png' \(empty\)"):
        model.images(tmp_path / "bad.png", on_bad_image="skip")
    (tmp_path / "half.png").write_bytes(fine.read_bytes()[:60])
    with pytest.raises(BadImageError, match=r"cannot read image 1 of those given, .*PngImageFile"):
        model.embed([fine, Image.open(tmp_path / "half.png")])


def test_a_model_is_known_by_its_weights(model: Model, finished: Path) -> None:
    assert model.identity == Model(finished).identity
    assert len(model.identity) == 64
