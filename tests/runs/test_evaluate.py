"""A run's evaluation, against the same done by hand."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from torch_emc2.config import Config, read_config
from torch_emc2.data import (
    BadImageError,
    ContrastiveDataset,
    RandomView,
    evaluation_transform,
    open_dataset,
)
from torch_emc2.evaluation import alignment, effective_rank, knn_accuracy, linear_probe, retrieval, uniformity
from torch_emc2.models import load_encoder
from torch_emc2.runs import embed_images, evaluate_run
from torch_emc2.training import train

NOTE = (
    "the classes are the folders: where those are albums or dates, what is alike is in several, and retrieval of the "
    "other view says more than probe and neighbours"
)


def test_evaluation_is_that_of_the_features(finished: Path) -> None:
    evaluation, written = evaluate_run(finished)
    assert json.loads((finished / "evaluation.json").read_text()) == asdict(evaluation)
    assert written == [finished / name for name in ("evaluation.json", "neighbours.png", "curves.png")]
    assert all(file.is_file() for file in written)
    assert (evaluation.train_images, evaluation.test_images, evaluation.viewed_images) == (1437, 360, 360)
    assert evaluation.notes == []
    encoder, transform = load_encoder(finished), evaluation_transform(8)
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
    views = ContrastiveDataset(images["test"].subset(order), RandomView(config.data.augmentation), seed=config.seed)
    with torch.no_grad():
        pairs = [encoder.features(torch.stack([views.view(0, i, v) for v in range(2)])) for i in range(360)]
    assert metrics["alignment"] == pytest.approx(alignment(torch.stack(pairs)), rel=1e-3)
    assert metrics["retrieval"] == pytest.approx(retrieval(torch.stack(pairs)), abs=0.005)


@pytest.mark.parametrize("before", ["untrained", "pretrained"])
def test_the_encoder_before_training_is_the_one_the_run_started_from(before: str, tiny: Config, tmp_path: Path) -> None:
    frozen = replace(tiny, optimizer=replace(tiny.optimizer, freeze_epochs=1), epochs=1, probe="sgd")
    if before == "pretrained":
        torch.save(timm.create_model(tiny.model.backbone).state_dict(), tmp_path / "w.pth")
        frozen = replace(frozen, model=replace(tiny.model, pretrained=str(tmp_path / "w.pth")))
    run = train(frozen)
    numbers = evaluate_run(run, baselines=True)[0].numbers
    assert list(numbers) == ["trained", before, "raw pixels"]
    assert numbers["trained"] == numbers[before]
    assert numbers["raw pixels"].keys() == numbers[before].keys()
    assert numbers["raw pixels"] != numbers[before]
    if before == "pretrained":
        (tmp_path / "w.pth").unlink()
        assert evaluate_run(run)[0].numbers["trained"] == numbers["trained"]


def paint(folder: Path, *counts: tuple[str, int]) -> str:
    """Draw so many RGB images of each class, each class of a colour, each image of a size, and name the data set."""
    generator = torch.Generator().manual_seed(0)
    for place, (name, count) in enumerate(counts):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = torch.randint(64, (9 + i, 12, 3), dtype=torch.uint8, generator=generator) + 40 * place
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


def test_images_beside_the_folders_are_said_to_be_a_class(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    data = paint(tmp_path / "shapes", ("x", 10), (".", 5))
    beside = "images that lie beside the folders count as a class of their own, '.'"
    assert evaluate_run(run, data)[0].notes == [NOTE, beside]


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
    assert evaluation.notes == ["classes without test images, not tested: 1 ('z')", NOTE]

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


def test_a_range_that_the_run_found_is_not_that_of_other_images(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    settings, out = (run / "config.yaml").read_text(), tmp_path / "out.parquet"
    (tmp_path / "deep").mkdir()
    for i in range(6):
        Image.fromarray(np.array([[0, 4000 + i]], np.uint16)).save(tmp_path / "deep" / f"{i}.tif")
    facts = json.loads((run / "versions.json").read_text())
    (run / "versions.json").write_text(json.dumps(facts | {"value_range": "0,65535"}))
    for use in (
        lambda: embed_images(run, tmp_path / "deep", out),
        lambda: evaluate_run(run, f"folder:{tmp_path}/deep"),
    ):
        with pytest.raises(BadImageError, match="6 images with 16-bit values, from 0 to 4005, of no known range"):
            use()
    assert evaluate_run(run, f"folder:{tmp_path}/deep", value_range="0,4095")[0].test_images == 2
    (run / "config.yaml").write_text(settings.replace("value_range: null", "value_range: 0,4095"))
    assert embed_images(run, tmp_path / "deep", out).embedded == 6
