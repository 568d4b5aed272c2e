"""What a finished run is used for, against the same done by hand."""

import json
import re
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
from torch_emc2.evaluation import alignment, effective_rank, knn_accuracy, linear_probe, retrieval, uniformity
from torch_emc2.models import load_encoder
from torch_emc2.runs import diagnose_run, embed_images, evaluate_run
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
    evaluation, written = evaluate_run(finished)
    assert json.loads((finished / "evaluation.json").read_text()) == asdict(evaluation)
    assert written == [finished / name for name in ("evaluation.json", "neighbours.png", "curves.png")]
    assert all(file.is_file() for file in written)
    assert (evaluation.train_images, evaluation.test_images, evaluation.viewed_images) == (1437, 360, 360)
    assert evaluation.notes == []
    encoder, transform = load_encoder(finished).eval(), evaluation_transform(8)
    images, features, labels = {}, {}, {}
    for split in ("probe", "test"):
        images[split] = open_dataset("digits", split, Path("data"))  # type: ignore[arg-type]
        part = [transform(images[split].image(i)) for i in range(len(images[split]))]
        with torch.no_grad():
            features[split] = encoder.features(torch.stack(part))
        labels[split] = images[split].labels
    parts: Any = features["probe"], labels["probe"], features["test"], labels["test"]
    metrics = evaluation.numbers["trained"]
    assert metrics["probe"] == pytest.approx(linear_probe(*parts).accuracy, abs=0.005)
    for metric in ("euclidean", "cosine"):
        by_hand = knn_accuracy(*parts, ks=(1, 10), metric=metric)  # type: ignore[arg-type]
        assert [metrics[f"knn{k}_{metric}"] for k in (1, 10)] == pytest.approx(list(by_hand.values()), abs=0.005)
    assert metrics["uniformity"] == pytest.approx(uniformity(features["test"]), rel=1e-3)
    assert metrics["effective_rank"] == pytest.approx(effective_rank(features["test"]), rel=1e-3)

    config = read_config(str(finished / "config.yaml"))
    order = torch.randperm(360, generator=torch.Generator().manual_seed(config.seed))
    views = ContrastiveDataset(images["test"].subset(order), config.data.augmentation.transform(), seed=config.seed)
    with torch.no_grad():
        pairs = [encoder.features(torch.stack([views.view(0, i, v) for v in range(2)])) for i in range(360)]
    assert metrics["alignment"] == pytest.approx(alignment(torch.stack(pairs)), rel=1e-3)
    assert metrics["retrieval"] == pytest.approx(retrieval(torch.stack(pairs)), abs=0.005)


def test_the_untrained_encoder_is_the_one_the_run_started_from(tiny: Config) -> None:
    frozen = replace(tiny, optimizer=replace(tiny.optimizer, lr=0.0, weight_decay=0.0), epochs=1, probe="sgd")
    frozen = replace(frozen, model=replace(frozen.model, norm="group"))  # batch norm would move its statistics
    numbers = evaluate_run(train(frozen), baselines=True)[0].numbers
    assert list(numbers) == ["trained", "untrained", "raw pixels"]
    assert numbers["trained"] == numbers["untrained"]
    assert numbers["raw pixels"].keys() == numbers["untrained"].keys()
    assert numbers["raw pixels"] != numbers["untrained"]


def paint(folder: Path, *counts: tuple[str, int]) -> str:
    """Draw so many RGB images of each class, each class of a colour, each image of a size, and name the data set."""
    generator = torch.Generator().manual_seed(0)
    for place, (name, count) in enumerate(counts):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = torch.randint(64, (9 + i, 12, 3), dtype=torch.uint8, generator=generator) + 40 * place
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


def test_another_data_set_has_files_of_its_own(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "evaluation.json").write_text("the run's own")
    data = paint(tmp_path / "a" / "shapes", ("x", 10), ("y", 5), ("z", 1))
    evaluation, (numbers, grid) = evaluate_run(run, data, baselines=True)
    assert re.fullmatch(r"evaluation-shapes-[0-9a-f]{6}\.json", numbers.name)
    assert grid.name == numbers.name.replace("evaluation", "neighbours").replace("json", "png")
    assert Image.open(grid).size[0] > 200
    assert json.loads(numbers.read_text()) == asdict(evaluation)
    assert (run / "evaluation.json").read_text() == "the run's own"
    assert evaluation.data == data
    assert (evaluation.train_images, evaluation.test_images) == (13, 3)
    assert evaluation.notes == ["classes without test images, not tested: 1 ('z')"]

    parts: list[Any] = []
    for split in ("probe", "test"):
        images = open_dataset(data, split, Path("data"), channels=1)  # type: ignore[arg-type]
        pixels = torch.stack([evaluation_transform(8)(images.image(i)) for i in range(len(images))])
        parts += [pixels.flatten(1), images.labels]
    measured = evaluation.numbers["raw pixels"]
    assert measured["probe"] == linear_probe(*parts).accuracy
    assert {k: measured[f"knn{k}_euclidean"] for k in (1, 10)} == knn_accuracy(*parts, ks=(1, 10))
    assert "knn20_euclidean" not in measured

    other = evaluate_run(run, paint(tmp_path / "b" / "shapes", ("x", 4), ("y", 3)))[1]
    assert numbers not in other


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        ([("", 6)], "no accuracies: the training images have no labels"),
        ([("x", 6)], "no accuracies: all training images are of one class, 'x'"),
        ([(name, 1) for name in "abcdef"], "no accuracies: the test images' classes have no training images: 'c', 'e'"),
        ([("", 2)], "one test image: what needs no labels compares two, at least"),
    ],
    ids=["no labels", "one class", "classes of one", "two images"],
)
def test_where_nothing_can_be_classified_the_rest_is_there(
    finished: Path, tmp_path: Path, counts: list[tuple[str, int]], note: str
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    evaluation, written = evaluate_run(run, paint(tmp_path / "photos", *counts))
    assert evaluation.notes[-1] == note
    if evaluation.test_images > 1:
        assert list(evaluation.numbers["trained"]) == ["alignment", "uniformity", "effective_rank", "retrieval"]
    assert all(file.is_file() for file in written)


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


def test_a_range_that_the_run_found_is_not_that_of_other_images(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    settings, out = (run / "config.yaml").read_text(), tmp_path / "out.parquet"
    (tmp_path / "deep").mkdir()
    for i in range(6):
        Image.fromarray(np.array([[0, 4000 + i]], np.uint16)).save(tmp_path / "deep" / f"{i}.tif")
    (run / "config.yaml").write_text(settings.replace("value_range: null", "value_range: 0,65535"))
    for use in (
        lambda: embed_images(run, tmp_path / "deep", out),
        lambda: evaluate_run(run, f"folder:{tmp_path}/deep"),
    ):
        with pytest.raises(BadImageError, match="6 images with 16-bit values, from 0 to 4005, of no known range"):
            use()
    assert evaluate_run(run, f"folder:{tmp_path}/deep", value_range="0,4095")[0].test_images == 2
    (run / "config.yaml").write_text(settings.replace("value_range: null", "value_range: 0,4095"))
    assert embed_images(run, tmp_path / "deep", out).embedded == 6


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
    by_hand = gradient_error(lambda _: DCLLoss(0.1), z, 0.1, 8, epochs=2, runs=3)
    assert diagnosis.errors["DCL"].squared_error == pytest.approx(by_hand.squared_error, rel=1e-3)
    assert diagnosis.target.peak == pytest.approx(target_statistics(z, 0.1, 8).peak, rel=1e-4)
    inner = diagnosis.errors["DCL"].at_parameters
    assert inner is not None
    assert inner.one_epoch > 0

    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["loss._extra_state"]
    differences = []
    for place, i in enumerate(picks):
        carried, stored = state["chains"]["ids"][i].item(), state["chains"]["similarities"][i].item() / 0.1
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
