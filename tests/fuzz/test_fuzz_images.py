"""Whatever lies in a folder: an image, or one line that names it; and no table that is not whole."""

import io
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fuzzing import TRIED, fuzz, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from torch_emc2.cli import main
from torch_emc2.data import BadImageError, DataError, decode_image, open_dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


GOOD = {
    "rgb.png": saved(RGB, "PNG"),
    "rgb.jpg": saved(RGB, "JPEG"),
    "rgb.gif": saved(RGB, "GIF"),
    "rgb.bmp": saved(RGB, "BMP"),
    "rgb.webp": saved(RGB, "WEBP"),
    "rgb.tiff": saved(RGB, "TIFF"),
    "deflate.tif": saved(RGB, "TIFF", compression="tiff_deflate"),
    "rgb.ppm": saved(RGB, "PPM"),
    "progressive.jpeg": saved(RGB, "JPEG", progressive=True),
    "cmyk.jpg": saved(RGB.convert("CMYK"), "JPEG"),
    "sixteen.png": saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "palette.png": saved(RGB.quantize(16), "PNG"),
    "transparent.png": saved(RGB.quantize(16), "PNG", transparency=3),
    "alpha.png": saved(RGB.convert("RGBA"), "PNG"),
    "grey-alpha.png": saved(RGB.convert("LA"), "PNG"),
    "bilevel.png": saved(RGB.convert("1"), "PNG"),
    "animated.gif": saved(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)] * 2),
    "animated.webp": saved(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)] * 2),
    "turned.jpg": saved(RGB, "JPEG", exif=exif(6)),
    "turned.png": saved(RGB, "PNG", exif=exif(8)),
    "turned nowhere.jpg": saved(RGB, "JPEG", exif=exif(77)),
    "a png inside.jpg": saved(RGB, "PNG"),
    "pixel.png": saved(RGB.crop((0, 0, 1, 1)), "PNG"),
    "line.png": saved(RGB.resize((300, 1)), "PNG"),
    "überraschung 猫 🐈.png": saved(RGB, "PNG"),
    "two\nlines.png": saved(RGB, "PNG"),
    "-o.png": saved(RGB, "PNG"),
    " .png": saved(RGB, "PNG"),
}
BAD = {
    "truncated.jpg": GOOD["rgb.jpg"][:400],
    "truncated.png": GOOD["rgb.png"][:200],
    "empty.jpg": b"",
    "empty.webp": b"",
    "text.png": b"not an image",
    "page.jpg": b"<html><body>404</body></html>",
    "program.gif": b"\x7fELF" + bytes(99),
    "pickle.png": b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.",
    "bomb.png": bomb(40_000, 40_000),
    "largest.png": bomb(2**31 - 1, 2**31 - 1),
    "flat.png": bomb(0, 7),
    "float.tif": saved(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"),
    "two\nlines bad.png": b"",
    "猫.jpg": b"\xff\xd8\xff",
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it repairs
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def is_image(path: Path) -> bool:
    """Whether it decodes; what does not must say so as it should."""
    image, words = refusal("images decoded", lambda: decode_image(path))
    if image is None:
        assert len(words.splitlines()) == 1
        assert words.startswith(f"cannot read image {str(path)!r}")
        return False
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert image.shape[0] == 3
    assert image.numel() > 0
    return True


def test_files_as_they_are_found(folder: Path) -> None:
    write(folder, GOOD | BAD)
    for name in GOOD | BAD:
        assert is_image(folder / name) == (name in GOOD), name


@fuzz(700)
@given(st.data())
def test_mutated_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw = random.Random(data.draw(st.integers(0, 10**9)))
    content = bytearray(GOOD[draw.choice(list(GOOD))])
    for _ in range(draw.randint(1, 6)):
        at = draw.choice([draw.randrange(len(content)), draw.randrange(min(80, len(content)))])  # headers matter most
        match draw.randrange(5):
            case 0 | 1:
                content[at] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
            case 2:
                content[at] ^= 1 << draw.randrange(8)
            case 3:
                del content[at : at + draw.randint(1, 40)]
            case 4:
                content[at:at] = content[at : at + draw.randint(1, 40)]
        content = content or bytearray(b"\0")
    file = tmp_path_factory.getbasetemp() / "mutated.png"
    file.write_bytes(content)
    is_image(file)


def line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    (only,) = err.splitlines()
    assert only.startswith("emc2: error: ")
    return only


@pytest.mark.parametrize("name", BAD)
def test_embed_stops_at_a_bad_image(
    name: str, folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TRIED["embed"] += 1
    write(folder, {"good.png": GOOD["rgb.png"], name: BAD[name]})
    out = folder.parent / "out.parquet"
    assert main(["embed", str(finished), str(folder), "-o", str(out)]) == 2
    assert repr(str(folder / name)) in line(capsys)
    assert sorted(folder.parent.iterdir()) == [folder]


def test_embed_skips_and_counts(folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TRIED["embed"] += 1
    write(folder, GOOD | BAD)
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "up").symlink_to(folder)
    (folder / "a folder.png").mkdir()
    out = folder.parent / "out.parquet"
    assert main(["embed", str(finished), str(folder), "-o", str(out), "--on-bad-image", "skip"]) == 0
    captured = capsys.readouterr()
    understood, skipped, last = captured.out.splitlines()
    assert understood == f"{str(folder)!r}: {len(GOOD) + len(BAD) + 2} images to embed."
    assert skipped.startswith("Unreadable, and left out: ")
    assert last == f"{len(GOOD)} images embedded; left out: {len(BAD) + 2} unreadable, 0 of other kinds: {out}"
    table = pq.read_table(out)
    assert sorted(table["path"].to_pylist()) == sorted(str(folder / name) for name in GOOD)
    assert np.isfinite(np.stack(table["embedding"].to_pylist())).all()


def test_embed_of_what_cannot_be_written_down(folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TRIED["embed"] += 1
    name = os.fsdecode(b"not utf-8 \xff.png")
    write(folder, {name: GOOD["rgb.png"], "good.png": GOOD["rgb.png"]})
    out = folder.parent / "out.parquet"
    assert main(["embed", str(finished), str(folder), "-o", str(out)]) == 2
    assert "UTF-8" in line(capsys)
    assert main(["embed", str(finished), str(folder), "-o", str(folder)]) == 2  # a folder is no file's name
    line(capsys)
    assert sorted(folder.parent.iterdir()) == [folder]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(folder: Path) -> None:
    write(folder, {"a.png": GOOD["rgb.png"]})
    (folder / "a.png").chmod(0)
    assert not is_image(folder / "a.png")


def test_open_dataset(folder: Path) -> None:
    write(folder, GOOD | BAD)
    for split in ("train", "probe", "test"):
        TRIED["folders"] += 1
        dataset = open_dataset(f"folder:{folder}", split, folder)  # type: ignore[arg-type]
        for i in range(len(dataset)):
            path = dataset.path(i)
            assert path is not None
            if Path(path).name in GOOD:
                assert dataset.image(i).shape[0] == 3
            else:
                with pytest.raises(BadImageError):
                    dataset.image(i)


MAKE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.mkdir(),
    "one image": lambda path: (path.mkdir(), write(path, {"a.png": GOOD["rgb.png"]})),
    "no images": lambda path: (path.mkdir(), write(path, {"a.txt": b"", ".hidden.png": GOOD["rgb.png"]})),
    "a file": lambda path: path.write_bytes(b""),
    "nothing": lambda path: None,
    "a link in a circle": lambda path: path.symlink_to(path),
    "empty splits": lambda path: ((path / "train").mkdir(parents=True), (path / "test").mkdir()),
}


def test_the_home_of_nobody(tmp_path: Path) -> None:
    TRIED["folders"] += 1
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset("folder:~nobody here/photos", "train", tmp_path)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("name", ["photos", "two\nlines", "x" * 300, "a\0b", "猫"])
def test_folders_without_images(
    name: str, make: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TRIED["folders"] += 1
    with suppress(OSError, ValueError):  # there can be no such folder; its name can be given all the same
        make(tmp_path / name)
    with pytest.raises(DataError) as error:
        open_dataset(f"folder:{tmp_path / name}", "train", tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert main(["train", "quickstart", "--data.name", f"folder:{tmp_path / name}", "--out", str(tmp_path / "r")]) == 2
    line(capsys)
