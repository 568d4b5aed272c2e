"""The table of embeddings, against the encoder's features by hand."""

import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from torch_emc2.data import (
    BadImageError,
    DataError,
    decode_image,
    evaluation_transform,
)
from torch_emc2.models import load_encoder, save_encoder
from torch_emc2.runs import (
    Model,
    embed_images,
    evaluate_run,
    find_duplicates,
    find_neighbours,
    map_of,
    read_table,
)
from torch_emc2.runs.table import write_table


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("b.png", "a.jpg", "deep/ü.png"):
        pixels = torch.randint(256, (20, 14, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_embeddings_are_the_features_of_the_images(finished: Path, photos: Path) -> None:
    out = photos.parent / "out.parquet"
    done = embed_images(finished, photos, out)
    assert (done.embedded, done.skipped) == (3, {})
    table = pq.read_table(out)
    paths = table["path"].to_pylist()
    assert paths == sorted(str(photos / name) for name in ("a.jpg", "b.png", "deep/ü.png"))
    assert table["label"].to_pylist() == [None, None, "deep"]
    assert json.loads(table.schema.metadata[b"torch_emc2"]) == {
        "model": Model(finished).identity,
        "run": str(finished),
        "normalized": False,
        "value_range": None,
    }
    encoder, transform = load_encoder(finished), evaluation_transform(8)
    for path, embedding in zip(paths, table["embedding"].to_pylist(), strict=True):
        red, green, blue = decode_image(path).float()
        grey = (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8)[None]
        with torch.no_grad():
            expected = encoder.features(transform(grey)[None])[0]
        torch.testing.assert_close(torch.tensor(embedding), expected, rtol=0.02, atol=0.02)


def test_unreadable_images_stop_or_are_counted_and_no_half_file_stays(
    finished: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = finished, photos.parent / "out.parquet"
    (photos / "bad.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"bad\.png"):
        embed_images(run, photos, out)
    assert list(photos.parent.glob("*out.parquet*")) == []

    def full(table: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="no space left"):
            embed_images(run, photos, out, on_bad_image="skip")
    assert list(photos.parent.glob("*out.parquet*")) == []
    done = embed_images(run, photos, out, on_bad_image="skip")
    assert (done.embedded, done.skipped) == (3, {str(photos / "bad.png"): "empty"})
    assert len(pq.read_table(out)) == 3


def test_embedding_follows_the_run_and_takes_single_files(finished: Path, photos: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("on_bad_image: raise", "on_bad_image: skip"))
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / "deep.tif")
    shutil.copy(photos / "b.png", tmp_path / "no image's name.txt")
    (photos / "notes.txt").write_text("no image")
    (photos / "bad.png").write_bytes(b"")
    paths, out = [photos, tmp_path / "deep.tif", tmp_path / "no image's name.txt"], tmp_path / "out.parquet"

    done = embed_images(run, paths, out)
    assert (done.embedded, list(done.skipped), dict(done.found.left_out)) == (
        4,
        [str(photos / "bad.png"), str(tmp_path / "deep.tif")],
        {".txt": 1},
    )
    with pytest.raises(ValueError, match=r"out.parquet is there already: --append adds to it; for a new table give"):
        embed_images(run, paths, out, value_range="0,4095")
    out.unlink()
    assert embed_images(run, paths, out, value_range="0,4095").embedded == 5
    rows = dict(zip(*(pq.read_table(out)[name].to_pylist() for name in ("path", "embedding")), strict=True))
    assert rows[str(photos / "b.png")] == pytest.approx(rows[str(tmp_path / "no image's name.txt")], abs=1e-3)
    with pytest.raises(
        BadImageError, match=r"1 image cannot be read: .*bad\.png' \(empty\): .*; 1 image with 16-bit val"
    ):
        embed_images(run, paths, tmp_path / "another.parquet", on_bad_image="raise")


def test_a_table_that_has_lost_all_its_rows(finished: Path, photos: Path) -> None:
    out, image = photos.parent / "out.parquet", photos / "a.jpg"
    width = embed_images(finished, image, out).embedded and read_table(out).embeddings.shape[1]
    whole = image.read_bytes()
    image.write_bytes(b"broken")
    assert embed_images(finished, image, out, append=True, on_bad_image="skip").embedded == 0
    assert read_table(out).embeddings.shape == (0, width)
    for use in (map_of, partial(find_duplicates, threshold=0.9), lambda of: find_neighbours(finished, [photos], of)):
        with pytest.raises(ValueError, match=r"out\.parquet has no images: add some by emc2 embed --append"):
            use(out)
    image.write_bytes(whole)
    assert embed_images(finished, image, out, append=True).embedded == 1
    assert read_table(out).embeddings.shape == (1, width)


def test_embedding_leaves_torchs_random_state_alone(finished: Path, photos: Path) -> None:
    model, before = Model(finished), torch.get_rng_state()
    model.embed([photos])
    assert torch.equal(torch.get_rng_state(), before)


def test_there_must_be_images_and_a_run(finished: Path, photos: Path) -> None:
    empty = photos.parent / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"not a run's folder: it has no config\.yaml"):
        evaluate_run(empty)
    (empty / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="is not finished: emc2 train"):
        evaluate_run(empty)
    (photos.parent / "none").mkdir()
    with pytest.raises(DataError, match=r"no images in .*none"):
        embed_images(finished, photos.parent / "none", photos.parent / "out.parquet")


def test_a_table_takes_further_rows_of_its_own_model_only(
    finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = tmp_path / "out.parquet", photos / "a.jpg"
    assert embed_images(finished, first, out, append=True).embedded == 1
    done = embed_images(finished, photos, out, append=True)
    assert (done.embedded, done.there) == (2, 1)
    whole, once = read_table(out), tmp_path / "once.parquet"
    assert list(whole.paths) == [str(photos / name) for name in ("a.jpg", "b.png", "deep/ü.png")]
    embed_images(finished, photos, once)
    torch.testing.assert_close(whole.embeddings, read_table(once).embeddings)
    content = out.read_bytes()
    assert embed_images(finished, photos, out, append=True)[::3] == (0, 3)
    monkeypatch.chdir(photos / "deep")  # where they have other names
    assert embed_images(finished, Path(".."), out, append=True)[::3] == (0, 3)

    moved = shutil.copytree(finished, tmp_path / "moved")  # the same model, wherever it is
    assert embed_images(moved, photos, out, append=True).embedded == 0
    other = shutil.copytree(finished, tmp_path / "other")
    encoder = load_encoder(other)
    next(iter(encoder.parameters())).data += 1
    save_encoder(encoder, other)
    with pytest.raises(ValueError, match=rf"out.parquet is of another model, that of {re.escape(str(finished))}: give"):
        embed_images(other, photos, out, append=True)
    with pytest.raises(ValueError, match=r"the rows of .*out.parquet are not normalised: leave out --normalize, or"):
        embed_images(finished, photos, out, append=True, normalize=True)
    assert out.read_bytes() == content
    pq.write_table(pq.read_table(out).replace_schema_metadata(None), out)
    with pytest.raises(ValueError, match=r"out.parquet does not say which model it is of"):
        embed_images(finished, photos, out, append=True)
    (tmp_path / "half.parquet").write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"half.parquet' is damaged, or no table of emc2 embed"):
        embed_images(finished, photos, tmp_path / "half.parquet", append=True)


def test_files_that_changed_are_embedded_anew(finished: Path, photos: Path, tmp_path: Path) -> None:
    out, once, old = (tmp_path / f"{name}.parquet" for name in ("out", "once", "old"))
    embed_images(finished, photos, out)
    pq.write_table(pq.read_table(out).drop_columns("modified"), old)
    before = read_table(out)
    shutil.copy(photos / "b.png", photos / "deep/ü.png")
    os.utime(photos / "deep/ü.png", ns=(0, 10**18))
    assert embed_images(finished, photos, old, append=True)[::3] == (0, 3), "it does not say when its files changed"
    assert embed_images(finished, photos, out, append=True)[::3] == (1, 2)
    embed_images(finished, photos, once)
    for table in map(read_table, (out, once)):
        assert table.paths == before.paths
        assert table.modified[2] == 10**18
        torch.testing.assert_close(table.embeddings[:2], before.embeddings[:2])
        torch.testing.assert_close(table.embeddings[2], before.embeddings[1])
    assert embed_images(finished, photos, out, append=True)[::3] == (0, 3)
    (photos / "a.jpg").write_bytes(b"broken")
    (photos / "new.png").write_bytes((photos / "b.png").read_bytes())
    embed_images(finished, photos, out, append=True, on_bad_image="skip")
    assert [Path(path).name for path in read_table(out).paths] == ["b.png", "ü.png", "new.png"]
    (photos / "b.png").write_bytes(b"broken")
    embed_images(finished, photos, out, append=True, on_bad_image="skip")  # with none that is new
    assert [Path(path).name for path in read_table(out).paths] == ["ü.png", "new.png"]
    (photos / "new.png").write_bytes(b"broken")
    embed_images(finished, photos / "new.png", out, append=True, on_bad_image="skip")  # alone
    assert [Path(path).name for path in read_table(out).paths] == ["ü.png"]


def test_rows_of_one_table_are_of_one_range(
    finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, deep = tmp_path / "out.parquet", [tmp_path / f"{i}.tif" for i in range(3)]
    for i, file in enumerate(deep):
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * (60 + i)).save(file)
    embed_images(finished, photos, out)  # which needs no range
    embed_images(finished, deep[0], out, append=True, value_range="0,4095")
    with pytest.raises(
        ValueError, match=r"out.parquet are of the value range 0,4095, not 0,65535: --value-range=0,4095"
    ):
        embed_images(finished, deep[1], out, append=True, value_range="0,65535")
    embed_images(finished, deep[1], out, append=True, value_range="0,4095")
    (hits,) = find_neighbours(finished, [deep[2]], out, 2).hits  # in the table's range
    assert {read_table(out).paths[i] for i, _ in hits} == {str(deep[0]), str(deep[1])}

    features = Model.features

    def meanwhile(*args: Any, **kwargs: Any) -> torch.Tensor:
        os.utime(out, ns=(1, 1))  # as another writer does
        return features(*args, **kwargs)

    monkeypatch.setattr(Model, "features", meanwhile)
    content = out.read_bytes()
    with pytest.raises(ValueError, match=r"out.parquet was changed by another process meanwhile, and stays"):
        embed_images(finished, deep[2], out, append=True, value_range="0,4095")
    assert out.read_bytes() == content


def test_rows_have_length_one_where_that_is_asked_for(finished: Path, photos: Path, tmp_path: Path) -> None:
    plain, normal = tmp_path / "plain.parquet", tmp_path / "normal.parquet"
    embed_images(finished, photos, plain)
    embed_images(finished, photos, normal, normalize=True)
    rows = read_table(plain).embeddings
    torch.testing.assert_close(read_table(normal).embeddings, rows / (rows * rows).sum(1, keepdim=True).sqrt())
    origin = read_table(normal).origin
    assert origin is not None
    assert origin.normalized


def test_a_file_is_itself_from_any_folder(
    finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By links and by paths that go up; also in a table of relative ones, as earlier versions wrote them."""
    (tmp_path / "deep" / "x").mkdir(parents=True)
    shutil.move(photos, tmp_path / "deep" / "photos")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "x")
    out, number = tmp_path / "out.parquet", len(os.listdir(tmp_path / "deep" / "photos"))
    monkeypatch.chdir(tmp_path)
    assert embed_images(finished, Path("link/../photos"), out).embedded == number
    monkeypatch.chdir(tmp_path / "deep")
    done = embed_images(finished, Path("photos"), out, append=True)
    assert (done.embedded, done.there) == (0, number)
    table = read_table(out)
    assert all(Path(path).is_relative_to(tmp_path / "deep" / "photos") for path in table.paths)
    (tmp_path / "deep" / "twice").symlink_to(tmp_path / "deep" / "photos")
    assert embed_images(finished, [Path("photos"), Path("twice")], tmp_path / "both.parquet").embedded == number
    assert sorted(read_table(tmp_path / "both.parquet").paths) == sorted(table.paths)
    (tmp_path / "deep" / "twice").unlink()
    (tmp_path / "cats").mkdir()
    shutil.copy(next(Path("photos").iterdir()), tmp_path / "cats" / "a.png")
    monkeypatch.chdir(tmp_path.parent)
    embed_images(finished, [tmp_path / "cats", Path(tmp_path.name)], tmp_path / "class.parquet")
    found = read_table(tmp_path / "class.parquet")  # in the first folder alone it would have no class
    assert dict(zip(found.paths, found.labels, strict=True))[str(tmp_path / "cats" / "a.png")] == "cats"
    monkeypatch.chdir(tmp_path / "deep")
    shutil.rmtree(tmp_path / "cats")
    old = replace(table, paths=[os.path.relpath(path) for path in table.paths])
    write_table(old, out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the paths of .*out\.parquet count from another folder \(photos/"):
        embed_images(finished, Path("deep/photos"), out, append=True)
    monkeypatch.chdir(tmp_path / "deep")
    shutil.copy(next(Path("photos").iterdir()), "photos/new.png")
    done = embed_images(finished, Path("photos"), out, append=True)
    assert (done.embedded, done.there) == (1, number)
    assert sorted(read_table(out).paths) == sorted([*table.paths, str(tmp_path / "deep" / "photos" / "new.png")])


def test_a_folder_whose_name_is_no_text_is_named(
    finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.fsdecode(os.fsencode(tmp_path) + b"/x\xff")
    shutil.copytree(photos, here)
    monkeypatch.chdir(here)
    with pytest.raises(DataError, match="is not UTF-8"):
        embed_images(finished, Path(), tmp_path / "out.parquet")
