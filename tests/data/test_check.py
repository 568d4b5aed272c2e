import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from torch_emc2.data import BadImageError, Check, check, check_files, decode_image, shown
from torch_emc2.settings.images import Decoding


def _noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def _files(folder):
    """Images and what is none; and what is to be said of the latter."""
    for kind in ("png", "jpg", "gif", "webp", "bmp"):
        Image.fromarray(_noise()).save(folder / f"good.{kind}")
    Image.fromarray(_noise()).save(folder / "trailer.jpg")
    with (folder / "trailer.jpg").open("ab") as file:
        file.write(bytes(100))  # as some cameras do
    bad = {}
    for kind, why in (
        ("png", "Error"),
        ("jpg", "truncated"),
        ("gif", "truncated"),
        ("webp", "Error"),
        ("bmp", "truncated"),
    ):
        content = (folder / f"good.{kind}").read_bytes()
        (folder / f"bad.{kind}").write_bytes(content[: len(content) // 2])
        bad[f"bad.{kind}"] = why
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    os.symlink("nowhere", folder / "gone.png")
    Image.new("1", (9000, 9000)).save(folder / "large.png")
    bad |= {"empty.png": "empty", "text.jpg": "no kind", "gone.png": "No such file", "large.png": "max_pixels"}
    return sorted(map(str, folder.iterdir())), bad


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_files_are_found(tmp_path, whole, num_workers):
    files, bad = _files(tmp_path)
    state = torch.get_rng_state()
    found = check_files(files, Decoding(), whole=whole, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(found.unreadable) == [str(tmp_path / name) for name in sorted(bad)]
    for name, why in bad.items():
        assert why in found.unreadable[str(tmp_path / name)], name
        assert "\n" not in found.unreadable[str(tmp_path / name)]


def test_what_only_decoding_finds_is_found_by_the_whole_check(tmp_path):
    Image.fromarray(_noise()).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "a.png").write_bytes(content)
    files = [str(tmp_path / "a.png")]
    assert not check_files(files, Decoding()).unreadable
    assert list(check_files(files, Decoding(), whole=True).unreadable) == files


def test_a_good_jpeg_or_png_is_not_decoded(tmp_path, monkeypatch):
    files, _ = _files(tmp_path)
    decoded = []
    monkeypatch.setattr(check, "decode", lambda path, decoding: decoded.append(os.path.basename(path)))
    check_files(files, Decoding())
    assert not {"good.png", "good.jpg", "trailer.jpg"} & set(decoded)
    assert {"good.gif", "good.webp", "bad.png", "bad.jpg"} <= set(decoded)


def test_what_was_found_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    files, _ = _files(tmp_path / "images")
    kept = tmp_path / "run" / "checked.json"
    looked = []
    look = check._Looked.__getitem__
    monkeypatch.setattr(check._Looked, "__getitem__", lambda self, i: looked.append(i) or look(self, i))
    first = check_files(files, Decoding(), kept=kept)
    assert len(looked) == len(files)
    assert check_files(files, Decoding(), kept=kept) == first
    assert len(looked) == len(files)
    os.utime(files[0], ns=(1, 1))
    check_files(files, Decoding(), kept=kept)
    check_files(files, Decoding(max_pixels=10**9), kept=kept)
    check_files(files, Decoding(), whole=True, kept=kept)
    assert len(looked) == 4 * len(files)
    kept.write_text("{damaged")
    assert check_files(files, Decoding(), kept=kept).unreadable == first.unreadable
    assert len(json.loads(kept.read_text())) == 1


@pytest.mark.parametrize(
    "content", ["[1]", "5", "null", pytest.param("[" * 100_000, id="nested"), b"\xff", 5, {}, {"deep": {}}]
)
@pytest.mark.parametrize("deep", [5, {"a": 5}, {"a": ["16-bit", "x", 1]}])
def test_what_is_kept_and_damaged_is_found_again(tmp_path, content, deep):
    Image.fromarray(_noise()).save(tmp_path / "a.png")
    kept, files = tmp_path / "checked.json", [str(tmp_path / "a.png")]
    check_files(files, Decoding(), kept=kept)
    whole = kept.read_text()
    if isinstance(content, bytes):
        kept.write_bytes(content)
    elif isinstance(content, str):
        kept.write_text(content)
    else:
        (key,) = json.loads(whole)
        kept.write_text(json.dumps({key: content or {"unreadable": {}, "deep": deep}}))
    assert check_files(files, Decoding(), kept=kept) == Check({}, {})
    assert kept.read_text() == whole


def _sixteen(folder, *largest, dtype=np.uint16):
    for i, value in enumerate(largest):
        Image.fromarray(np.array([[0, value]], dtype)).save(folder / f"{i}.tif")
    return sorted(str(file) for file in folder.glob("*.tif"))


def test_a_dark_image_among_those_that_fill_their_range_is_taken(tmp_path):
    files = _sixteen(tmp_path, 900, 65000, 30000)
    Image.fromarray(_noise()).save(tmp_path / "a.png")
    found = check_files([*files, str(tmp_path / "a.png")], Decoding())
    spans = [("16-bit", 0, most) for most in (900, 65000, 30000)]
    assert found == Check({}, dict(zip(files, spans, strict=True)))
    assert str(found) == (
        "3 images with 16-bit values, from 0 to 65000, taken as all of 0 to 65535; "
        "1 of them stay below 4096, as 12 bits do."
    )
    assert found.resolve(Decoding()) == (Decoding(value_range="0,65535"), {})
    given = Decoding(value_range="1%,99%")
    assert check_files(files, given).resolve(given) == (given, {})


@pytest.mark.parametrize(
    ("largest", "dtype", "words"),
    [
        ((4095, 900), np.uint16, "2 images with 16-bit values, from 0 to 4095, .* such as --range=0,4095,"),
        ((600,), np.uint16, "such as --range=0,1023,"),
        ((0,), np.uint16, "such as --range=0,1,"),
        ((32767,), np.uint16, "such as --range=0,32767,"),
        (
            (70000, -3),
            np.int32,
            "2 images with 32-bit or signed values, from -3 to 70000, .* such as --range=-3,70000,",
        ),
        (
            (1.5,),
            np.float32,
            "floating-point values, from 0 to 1.5, .* such as --range=0,1.5, or --range=1%,99% of each image's own",
        ),
    ],
)
def test_a_range_is_not_guessed(tmp_path, largest, dtype, words):
    found = check_files(_sixteen(tmp_path, *largest, dtype=dtype), Decoding())
    assert not found.unreadable
    assert re.search(words, found.refusal("mend it", "--range"))
    assert str(found) == ""
    decoding, unreadable = found.resolve(Decoding())
    assert decoding == Decoding()
    for file, why in unreadable.items():
        with pytest.raises(BadImageError) as error:
            decode_image(file)
        assert str(error.value) == f"cannot read image {file!r} ({why})"
    given = Decoding(value_range="0,5000")
    assert check_files(list(unreadable), given).resolve(given) == (given, {})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_unreadable(tmp_path, value):
    files = _sixteen(tmp_path, value, dtype=np.float32)
    found = check_files(files, Decoding())
    assert found == Check({files[0]: "it has values that are not finite"}, {})
    assert found == check_files(files, Decoding(value_range="0,1"))


def test_a_range_for_some_is_none_for_others(tmp_path):
    files = _sixteen(tmp_path, 65535)
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "empty.png").write_bytes(b"")
    found = check_files([*files, str(tmp_path / "float.tif"), str(tmp_path / "empty.png")], Decoding())
    assert found.refusal("mend it", "--range").replace(str(tmp_path), "FOLDER") == (
        "1 image cannot be read: 'FOLDER/empty.png' (empty): mend it; 1 image with floating-point values, from 1 to 1, "
        "of no known range ('FOLDER/float.tif' first): give it, such as --range=1,2, "
        "or --range=1%,99% of each image's own values"
    )
    decoding, unreadable = found.resolve(Decoding())
    assert decoding.value_range == "0,65535"
    assert sorted(unreadable) == [str(tmp_path / "empty.png"), str(tmp_path / "float.tif")]


def test_the_first_are_named():
    unreadable = {f"{i}.png": "empty" for i in range(5)}
    assert shown(unreadable) == "'0.png' (empty); '1.png' (empty); '2.png' (empty); …"
    assert shown({"a\nb.png": "empty"}) == r"'a\nb.png' (empty)"
