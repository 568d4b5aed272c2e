import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from torch_emc2.data import BadImageError, DataError, class_of, decode_image, find_images, folders, read_folder


def _images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(folder / name, "PNG")


def _below(folder, listing):
    return [os.path.relpath(file, folder) for file in listing]


def _refused(folder):
    with pytest.raises(DataError) as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "FOLDER")


# --- what is an image -------------------------------------------------------------------------------------------------


def test_all_that_pillow_opens_is_found_and_read(tmp_path):
    kinds = [
        *("png", "jpg", "jfif", "jpe", "bmp", "dib", "gif", "tif", "webp", "avif"),
        *("jp2", "j2k", "ico", "tga", "ppm", "pcx", "qoi", "apng", "sgi", "dds"),
    ]
    for kind in kinds:
        Image.new("RGB", (16, 16), (200, 200, 200)).save(tmp_path / f"a.{kind}")
    Image.new("RGB", (16, 16), (200, 200, 200)).save(tmp_path / "a.mpo", "JPEG")
    found = find_images(tmp_path)
    assert _below(tmp_path, found.files) == sorted(f"a.{kind}" for kind in [*kinds, "mpo"])
    assert not found.left_out
    for file in found.files:
        assert decode_image(file).sub(200).abs().max() <= 3, file


def test_where_the_name_does_not_tell_the_content_does(tmp_path):
    for name, kind in (("photo", "PNG"), ("scan.0", "JPEG"), ("cell.dat", "TIFF"), ("a.heic.bak", "WEBP")):
        Image.new("RGB", (4, 4)).save(tmp_path / name, kind)
    (tmp_path / "phone").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    others = {
        "notes.txt": b"P1 is a plane",
        "a.json": b"{}",
        "page.pdf": b"%PDF-1.4",
        "figure.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "film.mpg": b"\0\0\1\xb3",
        "README": b"\0" * 600,
        "empty": b"",
        ".hidden.png": b"",
        ".DS_Store": b"",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (4, 4)).save(tmp_path / "camera.NEF", "TIFF")  # its thumbnail, which is not the image
    found = find_images(tmp_path)
    assert _below(tmp_path, found.files) == ["a.heic.bak", "cell.dat", "phone", "photo", "scan.0"]
    assert dict(found.left_out) == {
        **dict.fromkeys((".txt", ".json", ".pdf", ".eps", ".mpg", ".nef"), 1),
        "without suffix": 2,
        "hidden": 2,
    }
    assert str(found).startswith("Left out: 2 ")
    assert str(found).endswith(", ….")


def test_links_and_what_is_no_file(tmp_path):
    _images(tmp_path / "elsewhere", "1.png", "2.png")
    _images(tmp_path, "tree/a/3.png", "tree/b/4.png")
    tree = tmp_path / "tree"
    os.symlink(tmp_path / "elsewhere", tree / "linked")
    os.symlink(tree, tree / "loop")
    os.symlink(tree / "b", tree / "a" / "other")  # and back: a circle that no link to a folder above closes
    os.symlink(tree / "a", tree / "b" / "other")
    os.symlink(tmp_path / "gone.png", tree / "broken.png")
    os.mkfifo(tree / "pipe.png")  # opening one would wait for ever
    os.mkfifo(tree / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "socket.png"))
        found = find_images(tree)
    names = ["a/3.png", "a/other/4.png", "b/4.png", "b/other/3.png", "broken.png", "linked/1.png", "linked/2.png"]
    assert _below(tree, found.files) == names
    assert dict(found.left_out) == {"that are no files": 3}


def test_single_files_are_images_whatever_their_name(tmp_path):
    _images(tmp_path, "a/1.png", "a/2.png", "b.txt", ".c.png")
    found = find_images(tmp_path / "b.txt", tmp_path / "a", tmp_path / ".c.png", tmp_path / "a" / "1.png")
    assert _below(tmp_path, found.files) == [".c.png", "a/1.png", "a/2.png", "b.txt"]
    with pytest.raises(DataError, match=r"^there is no '.*nowhere': give images"):
        find_images(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    _images(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refuse(path):
        if path.endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", refuse)  # root may list any
    with pytest.raises(DataError, match=r"/b' cannot be listed \(PermissionError: .*Permission denied\)"):
        find_images(tmp_path)


def test_pictures_of_a_run_below_its_images_are_none_of_them(tmp_path):
    _images(tmp_path, "a/1.png", "b/2.png", "runs/train/curves.png", "runs/train/more/3.png", "c/config.yaml.png")
    for name in ("runs/train/config.yaml", "runs/train/versions.json", "c/config.yaml"):
        (tmp_path / name).write_text("")
    found = find_images(tmp_path)
    assert _below(tmp_path, found.files) == ["a/1.png", "b/2.png", "c/config.yaml.png"]
    assert dict(found.left_out) == {".yaml": 1, "folders of runs": 1}
    assert read_folder(tmp_path).classes == ["a", "b", "c"]
    assert len(find_images(tmp_path / "runs" / "train").files) == 2  # asked for by its name


# --- splits and classes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize(
    "held_out", ["test", "Testing", "val", "VAL", "valid", "validation", "Validation", "dev", "eval", "evaluation"]
)
def test_splits_are_known_by_their_usual_names(tmp_path, train, held_out):
    _images(tmp_path, f"{train}/b/1.png", f"{train}/c/1.png", f"{held_out}/a/1.png", f"{held_out}/c/1.png")
    folder = read_folder(tmp_path)
    assert [(_below(tmp_path, [file]), name) for file, name in folder.train] == [
        ([f"{train}/{name}/1.png"], name) for name in "bc"
    ]
    assert [(_below(tmp_path, [file]), name) for file, name in folder.held_out] == [
        ([f"{held_out}/{name}/1.png"], name) for name in "ac"
    ]
    assert folder.classes == ["a", "b", "c"]


def test_of_two_held_out_parts_the_test_part_tests(tmp_path):
    _images(tmp_path, "train/1.png", "train/2.png", "test/3.png", "dev/4.png", "extra/5.png", "6.png")
    (tmp_path / "notes.txt").write_text("no image")
    folder = read_folder(tmp_path)
    assert [_below(tmp_path, [file for file, _ in part]) for part in (folder.train, folder.held_out)] == [
        ["train/1.png", "train/2.png"],
        ["test/3.png"],
    ]
    assert str(folder) == (
        f"{str(tmp_path)!r}: 2 training images in 'train/', without classes. "
        "Held out, to test on: 1 in 'test/', without classes. "
        "Left out: 1 .txt, 1 images beside the splits, 1 images in 'dev', 1 images in 'extra'."
    )


def test_a_training_part_alone_has_its_fifth_held_out(tmp_path):
    _images(tmp_path, *(f"train/{name}/{i}.png" for name, count in (("a", 3), ("train", 1)) for i in range(count)))
    folder = read_folder(tmp_path)  # below it no name is one of a split: a class may well be called so
    assert folder.classes == ["a", "train"]
    assert folder.held_out is None
    assert str(folder) == (
        f"{str(tmp_path)!r}: 4 training images in 'train/', 2 classes of 1 ('train') to 3 images. "
        "There is no test part: all are trained on, and a fixed fifth of each class tests the probe that is fitted "
        "on the rest."
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["Train/a/1.png", "training/a/1.png"], "'FOLDER' has both 'Train' and 'training' for its train part"),
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "has both 'val' and 'valid' for its validation part"),
        (["test/1.png", "test/2.png"], "'FOLDER' has 'test' to test on, but no folder 'train'"),
        (["car/1.png", "bus/2.png", "test/2.png"], "'FOLDER' has 'test' to test on, but no folder 'train'"),
        (["car/1.png", "bus/2.png", "train/2.png"], "'FOLDER' has 'train' beside 'bus', 'car', a class or all that"),
        (["train/1.png", "val/1.png"], "'FOLDER/train' holds 1 images, at least 2 are needed"),
        (["a.png"], "'FOLDER' holds 1 images, at least 2 are needed"),
    ],
)
def test_what_can_be_understood_in_two_ways_is_refused(tmp_path, names, words):
    _images(tmp_path, *names)
    assert words in _refused(tmp_path)


def test_an_empty_part_is_no_reason_to_train_on_another(tmp_path):
    _images(tmp_path, "train/a/1.png", "train/a/2.png")
    (tmp_path / "valid" / "a").mkdir(parents=True)
    assert "'FOLDER/valid' holds 0 images, at least 1 are needed" in _refused(tmp_path)


def test_folders_of_code_beside_classes_are_no_splits(tmp_path):
    _images(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test.py").write_text("")
    assert read_folder(tmp_path).classes == ["cat", "dog"]


def test_folders_without_images(tmp_path):
    assert "is not a folder" in _refused(tmp_path / "no")
    assert "holds 0 images" in _refused(tmp_path)


def test_names_of_any_kind_stay_in_one_line(tmp_path):
    _images(tmp_path, "two\nlines/a\nb.png", "two\nlines/c.png", "d/e.png")
    (tmp_path / "f.g\nh").write_text("")
    assert len(str(read_folder(tmp_path)).splitlines()) == 1


def test_heic_is_an_image_that_stops_or_is_counted(tmp_path):
    _images(tmp_path, "a.png", "b.png")
    (tmp_path / "c.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    assert len(read_folder(tmp_path).train) == 3
    with pytest.raises(BadImageError, match="pillow-heif"):
        decode_image(tmp_path / "c.HEIC")


def test_an_image_is_of_the_class_that_its_folder_is_read_as(tmp_path):
    _images(tmp_path, "train/cat/deep/a.png", "train/dog/b.png", "test/cat/c.png")
    folder = read_folder(tmp_path)
    for file, name in [*folder.train, *folder.held_out]:
        assert class_of(file, [tmp_path]) == name
    dog = str(tmp_path / "train/dog/b.png")
    assert class_of(dog, [tmp_path / "train/dog", tmp_path]) is None  # in the first folder that holds it
    assert class_of(dog, [tmp_path / "train"]) == "dog"
    assert class_of(dog, [Path(dog)]) is None
