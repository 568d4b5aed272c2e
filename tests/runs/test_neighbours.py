"""Neighbours of images, against all cosines in a loop."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from torch_emc2.config import read_config, recorded_config
from torch_emc2.data import open_splits
from torch_emc2.runs import (
    Model,
    Neighbours,
    draw_duplicates,
    draw_neighbours,
    embed_images,
    find_duplicates,
    find_neighbours,
    read_table,
)
from torch_emc2.runs.gallery import Gallery, of_images
from torch_emc2.runs.neighbours import OTHER, SAME, Hit, nearest_in
from torch_emc2.runs.tiles import PLAIN
from torch_emc2.training import train
from torch_emc2.training.run_images import same_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for name in ("cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png", "dog/e.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / name)
    return folder


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    dot, a, b = (sum(p * q for p, q in zip(u.tolist(), v.tolist(), strict=True)) for u, v in ((x, y), (x, x), (y, y)))
    return dot / math.sqrt(a * b)


def test_neighbours_in_a_table_are_those_of_the_largest_cosines(finished: Path, photos: Path, tmp_path: Path) -> None:
    out, query = tmp_path / "out.parquet", photos / "cat/a.png"
    embed_images(finished, photos, out, normalize=True)
    shutil.copy(query, tmp_path / "elsewhere.png")
    found = find_neighbours(finished, [query, tmp_path / "elsewhere.png"], out, k=3)
    table = read_table(out)
    rows, own = zip(table.embeddings, table.paths, strict=True), Model(finished).embed(query)[0]
    by_hand = sorted(((cosine(own, row), path) for row, path in rows), reverse=True)
    for hits, expected in zip(found.hits, (by_hand[1:4], by_hand[:3]), strict=True):  # a copy elsewhere finds it
        assert [table.paths[hit.row] for hit in hits] == [path for _, path in expected]
        assert [hit.similarity for hit in hits] == pytest.approx([similarity for similarity, _ in expected], abs=1e-4)
    first, *lines = str(found).splitlines()
    assert first == str(query)
    label = Path(by_hand[1][1]).parent.name
    assert lines[0] == f"  {found.hits[0][0].similarity:6.3f}  {label}  {by_hand[1][1]}"


def test_a_picture_takes_the_place_of_none_of_its_images(finished: Path, photos: Path, tmp_path: Path) -> None:
    out, query = tmp_path / "out.parquet", photos / "cat/a.png"
    embed_images(finished, photos, out)
    content = query.read_bytes()
    found = find_neighbours(finished, [query], out, k=2)
    (tmp_path / "link.png").symlink_to(query)
    for picture in (query, tmp_path / "link.png"):
        with pytest.raises(ValueError, match=r"is one of the images themselves: give the picture another name by -o"):
            draw_neighbours(found, picture)
        with pytest.raises(ValueError, match=r"is one of the images themselves"):
            draw_duplicates(find_duplicates(out, -1.0), picture)
    assert query.read_bytes() == content
    for _ in range(2):  # one that it has drawn before
        draw_neighbours(found, tmp_path / "found.png")


def test_images_that_a_run_skipped_are_not_searched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One is broken in its middle, which training finds when it decodes it."""
    for i in range(20):
        pixels = torch.randint(256, (40, 40), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{i:02}.png")
    broken = tmp_path / "photos" / "07.png"
    content = bytearray(broken.read_bytes())
    content[300:500] = bytes(200)
    broken.write_bytes(content)
    words = f"--data.name folder:{tmp_path / 'photos'} --data.on_bad_image skip --data.augmentation.size 8"
    words += f" --data.channels 1 --batch_size 8 --epochs 1 --accelerator cpu --out {tmp_path / 'run'}"
    caplog.set_level("INFO")
    run = train(read_config("quickstart", words.split()))
    assert "Images that could not be read were left out 1 times" in caplog.text
    found = find_neighbours(run, [tmp_path / "photos" / "01.png"], k=30)
    assert len(found.gallery) == 19
    assert str(broken) not in found.gallery.names


def test_without_a_table_the_runs_own_images_are_searched(finished: Path, photos: Path) -> None:
    images = same_images(recorded_config(finished), finished)
    pixels = images.image(40)[0].numpy()
    Image.fromarray(pixels).save(photos.parent / "digit.png")
    found = find_neighbours(finished, [photos.parent / "digit.png"], k=100)
    assert len(found.gallery) == 66
    assert len(found.hits[0]) == 66  # all there are
    best = found.hits[0][0]
    assert (best.row, best.similarity) == (40, pytest.approx(1, abs=1e-5))
    assert found.gallery.names[40] == f"digits {int(images.rows[40])}"


def test_a_table_of_another_model_is_refused(finished: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    embed_images(finished, photos, out)
    other = shutil.copytree(finished, tmp_path / "other")
    content = bytearray((other / "head.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "head.safetensors").write_bytes(content)
    message = rf"out.parquet is that of {finished}, not of {other}: emc2 embed {other} FOLDER -o ANOTHER.parquet"
    with pytest.raises(ValueError, match=message):
        find_neighbours(other, [photos], out)
    again = tmp_path / "again.parquet"
    embed_images(other, photos, again)
    shutil.copy(finished / "head.safetensors", other)  # as if it had been trained on
    with pytest.raises(ValueError, match=rf"is that of {other} before its further training, not of {other}"):
        find_neighbours(other, [photos], again)
    with pytest.raises(ValueError, match=rf"another model, that of {other} before its further training: give another"):
        embed_images(other, photos, again, append=True)


def gallery(labels: list[str | None]) -> Gallery:
    unit = torch.eye(4)[: len(labels)] + 0.1
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    return Gallery(unit, [f"{i}.png" for i in range(len(labels))], labels, lambda i: image)


def test_an_image_is_not_its_own_neighbour(tmp_path: Path) -> None:
    own = gallery(["a", "b", "c"])
    found = nearest_in(own, own, 2)
    assert [sorted(hit.row for hit in hits) for hits in found.hits] == [[1, 2], [0, 2], [0, 1]]


def test_frames_tell_whether_classes_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("torch_emc2.runs.neighbours.draw_rows", lambda *args, **kwargs: drawn.append((args, kwargs)))
    found = Neighbours(
        gallery(["a", None]), gallery(["a", "b", None]), [[Hit(0, 0.5), Hit(1, 0.25), Hit(2, 0.125)]] * 2
    )
    draw_neighbours(found, tmp_path / "n.png")
    (((rows, *_), settings),) = drawn
    assert [[tile.frame for tile in row] for row in rows] == [[PLAIN, SAME, OTHER, PLAIN], [PLAIN] * 4]
    assert [list(tile.lines) for tile in rows[0]] == [
        ["query", "a", "0.png"],
        ["0.500", "a", "0.png"],
        ["0.250", "b", "1.png"],
        ["0.125", "2.png"],
    ]
    assert list(settings["legend"].values()) == [SAME, OTHER]


def test_a_title_says_what_is_below_and_how_many_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr("torch_emc2.runs.neighbours.draw_rows", lambda rows, title, *_, **__: titles.append(title))
    for count, label in ((1, None), (51, "a")):
        queries = gallery([label] * count)
        draw_neighbours(Neighbours(queries, gallery([None]), [[Hit(0, 0.5)]] * count), tmp_path / "n.png", "Found")
    assert titles == [
        "Found; below: cosine similarity, name",
        "Found (the first 50 of 51); below: cosine similarity, class, name",
    ]


def test_images_beside_folders_of_classes_have_no_class(photos: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photos, tmp_path / "both")
    first = sorted(folder.rglob("*.png"))[0]
    shutil.copy(first, folder / "alone.png")
    (images,) = open_splits(f"folder:{folder}", ["train"], tmp_path)
    gallery = of_images(images, torch.zeros(len(images), 2), "both")
    label = dict(zip(gallery.names, gallery.labels, strict=True))
    assert label[str(folder / "alone.png")] is None
    assert label[str(first)] == first.parent.name
