"""The table of embeddings, against the encoder's features by hand."""

import shutil
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
from torch_emc2.models import load_encoder
from torch_emc2.runs import embed_images, evaluate_run


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
    encoder, transform = load_encoder(finished).eval(), evaluation_transform(8)
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
    assert embed_images(run, paths, out, value_range="0,4095").embedded == 5
    rows = dict(zip(*(pq.read_table(out)[name].to_pylist() for name in ("path", "embedding")), strict=True))
    assert rows[str(photos / "b.png")] == pytest.approx(rows[str(tmp_path / "no image's name.txt")], abs=1e-3)
    with pytest.raises(
        BadImageError, match=r"1 image cannot be read: .*bad\.png' \(empty\): .*; 1 image with 16-bit val"
    ):
        embed_images(run, paths, out, on_bad_image="raise")


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
