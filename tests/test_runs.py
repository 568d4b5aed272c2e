"""What a finished run is used for, against the same done by hand."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from torch_emc2 import DCLLoss
from torch_emc2.config import Config, read_config
from torch_emc2.data import (
    BadImageError,
    ContrastiveDataset,
    DataError,
    decode_image,
    evaluation_transform,
    open_dataset,
)
from torch_emc2.diagnostics import gradient_error, target_statistics
from torch_emc2.evaluation import knn_accuracy, linear_probe
from torch_emc2.models import load_encoder
from torch_emc2.runs import compare_with_baselines, diagnose_run, draw, embed_folder, evaluate_run
from torch_emc2.training import train


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("b.png", "a.jpg", "deep/ü.png"):
        pixels = torch.randint(256, (20, 14, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_evaluation_is_that_of_the_features(finished: Path) -> None:
    metrics = evaluate_run(finished)
    assert json.loads((finished / "evaluation.json").read_text()) == metrics
    encoder, transform = load_encoder(finished).eval(), evaluation_transform(8)
    parts = []
    for split in ("probe", "test"):
        images = open_dataset("digits", split, Path("data"))  # type: ignore[arg-type]
        with torch.no_grad():
            x = encoder.features(torch.stack([transform(images.image(i)) for i in range(len(images))]))
        assert images.labels is not None
        parts += [x, images.labels]
    assert metrics["probe"] == pytest.approx(linear_probe(*parts).accuracy, abs=0.005)
    for metric in ("euclidean", "cosine"):
        by_hand = knn_accuracy(*parts, ks=(1, 10), metric=metric)  # type: ignore[arg-type]
        assert [metrics[f"knn{k}_{metric}"] for k in (1, 10)] == pytest.approx(list(by_hand.values()), abs=0.005)


def test_the_untrained_encoder_is_the_one_the_run_started_from(tiny: Config) -> None:
    frozen = replace(tiny, optimizer=replace(tiny.optimizer, lr=0.0, weight_decay=0.0), epochs=1, probe="sgd")
    frozen = replace(frozen, model=replace(frozen.model, norm="group"))  # batch norm would move its statistics
    results = compare_with_baselines(train(frozen))
    assert results["trained"] == results["untrained"]
    assert results["raw pixels"] != results["untrained"]


def test_embeddings_are_the_features_of_the_images(finished: Path, photos: Path) -> None:
    out = photos.parent / "out.parquet"
    done = embed_folder(finished, photos, out)
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
        embed_folder(run, photos, out)
    assert list(photos.parent.glob("*out.parquet*")) == []

    def full(table: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="no space left"):
            embed_folder(run, photos, out, on_bad_image="skip")
    assert list(photos.parent.glob("*out.parquet*")) == []
    done = embed_folder(run, photos, out, on_bad_image="skip")
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

    done = embed_folder(run, paths, out)
    assert (done.embedded, list(done.skipped), dict(done.found.left_out)) == (
        4,
        [str(photos / "bad.png"), str(tmp_path / "deep.tif")],
        {".txt": 1},
    )
    assert embed_folder(run, paths, out, value_range="0,4095").embedded == 5
    rows = dict(zip(*(pq.read_table(out)[name].to_pylist() for name in ("path", "embedding")), strict=True))
    assert rows[str(photos / "b.png")] == pytest.approx(rows[str(tmp_path / "no image's name.txt")], abs=1e-3)
    with pytest.raises(
        BadImageError, match=r"1 image cannot be read: .*bad\.png' \(empty\): .*; 1 image with 16-bit val"
    ):
        embed_folder(run, paths, out, on_bad_image="raise")


def test_there_must_be_images_a_run_and_labels(tiny: Config, finished: Path, photos: Path) -> None:
    empty = photos.parent / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"not a run's folder: it has no config\.yaml"):
        evaluate_run(empty)
    (empty / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="is not finished: emc2 train"):
        evaluate_run(empty)
    (photos.parent / "none").mkdir()
    with pytest.raises(DataError, match=r"no images in .*none"):
        embed_folder(finished, photos.parent / "none", photos.parent / "out.parquet")
    flat = photos / "deep" / "flat"
    flat.mkdir()
    for name in "ab":
        Image.new("RGB", (9, 9)).save(flat / f"{name}.png")
    unlabelled = replace(tiny, data=replace(tiny.data, name=f"folder:{flat}"), batch_size=2, out=tiny.out + "-flat")
    with pytest.raises(DataError, match="no labels to evaluate with"):
        evaluate_run(train(unlabelled))


def test_pictures_are_drawn(finished: Path) -> None:
    pictures = draw(finished, queries=3, neighbours=2)
    assert [picture.name for picture in pictures] == ["curves.png", "neighbours.png"]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        width, height = Image.open(picture).size
        assert width > 200
        assert height > 200


def test_a_diagnosis_is_that_of_the_run_s_views_and_weights(finished: Path) -> None:
    diagnosis = diagnose_run(finished, samples=24, batch_size=8, epochs=2, seed=1)
    written = json.loads((finished / "diagnosis.json").read_text())
    assert written == json.loads(json.dumps(asdict(diagnosis)))
    assert (written["samples"], written["batch_size"], written["temperature"]) == (24, 8, 0.1)
    text = (finished / "diagnosis.md").read_text()
    assert all(text.count(f"| {name} |") >= 2 for name in diagnosis.errors)
    width, height = Image.open(finished / "diagnosis.png").size
    assert (width, height) == (1500, 570)

    config = read_config(str(finished / "config.yaml"))
    images = open_dataset("digits", "train", Path("data"), limit=66, seed=config.seed)
    views = ContrastiveDataset(images, config.data.augmentation.transform(), seed=1)
    picks = torch.randperm(66, generator=torch.Generator().manual_seed(1))[:24].tolist()
    encoder = load_encoder(finished).eval()

    def embed(i: int) -> Tensor:
        return F.normalize(encoder(torch.stack([views.view(0, i, view) for view in range(2)])), dim=1).detach()

    z = torch.stack([embed(i) for i in picks])
    by_hand = gradient_error(lambda _: DCLLoss(0.1), z, 8, epochs=2, runs=3)
    assert diagnosis.errors["DCL"].squared_error == pytest.approx(by_hand.squared_error, rel=1e-3)
    assert diagnosis.target.peak == pytest.approx(target_statistics(z, 0.1, 8).peak, rel=1e-4)
    inner = diagnosis.errors["DCL"].at_parameters
    assert inner is not None
    assert inner.one_epoch > 0

    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["loss._extra_state"]
    differences = []
    for place, i in enumerate(picks):
        carried, stored = state["chains"]["ids"][i].item(), state["chains"]["scores"][i].item()
        if carried >= 0:
            differences += (z[place] @ embed(carried).T / 0.1 - stored).abs().flatten().tolist()
    assert diagnosis.staleness is not None
    assert 4 * diagnosis.staleness.chains == len(differences)
    assert diagnosis.staleness.median == pytest.approx(float(torch.tensor(differences).quantile(0.5)), rel=1e-3)


def test_a_damaged_checkpoint_is_not_diagnosed(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    torch.save({"a": 1}, run / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        diagnose_run(run, samples=16, epochs=1)


def test_samples_must_fill_a_batch(finished: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be from 2 to the 10 samples, got 16"):
        diagnose_run(finished, samples=10)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        diagnose_run(finished, samples=20, epochs=0)


def test_finite_views_are_diagnosed_without_staleness(tiny: Config, tmp_path: Path) -> None:
    data = replace(tiny.data, finite_views=2, root=str(tmp_path))
    run = train(replace(tiny, epochs=1, data=data))
    assert diagnose_run(run, samples=20, batch_size=5, epochs=1).staleness is None
