"""What one does with a finished run: evaluate its encoder, look at it, embed images with it, diagnose its gradients."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from torch_emc2.chains import EMPTY
from torch_emc2.config import Config, read_config
from torch_emc2.data import (
    BadImageError,
    ContrastiveDataset,
    DataError,
    FileImages,
    Found,
    ImageDataset,
    check_files,
    evaluation_transform,
    find_images,
    shown,
)
from torch_emc2.diagnosis import Diagnosis, diagnose, embed_views, to_markdown
from torch_emc2.diagnostics import Staleness, score_staleness
from torch_emc2.evaluation import evaluate, extract_features, nearest_neighbours, raw_pixels
from torch_emc2.files import load_checkpoint, whole_file
from torch_emc2.models import Encoder, build_encoder, load_encoder
from torch_emc2.report import plot_curves, plot_errors, plot_neighbours
from torch_emc2.run_images import evaluation_part, same_images

__all__ = ["Embedded", "compare_with_baselines", "diagnose_run", "draw", "embed_folder", "evaluate_run"]

Metrics = dict[str, float]

_LOG = logging.getLogger(__name__)
_CPU = torch.device("cpu")


def evaluate_run(run: Path) -> Metrics:
    """Probe a run's encoder and classify by nearest neighbours; writes evaluation.json and returns what is in it.

    The probe is fitted, and its L2 strength chosen, on the labelled training part; the test part is used once.

    Raises:
        ValueError: the folder is no finished run, its files are damaged, or its data set has no labels.
    """
    config, encoder = _load(run)
    train, test = _labelled_parts(config)
    device = _device(config)
    encoder.to(device)
    features = (*_features(encoder, config, train, device), *_features(encoder, config, test, device))
    metrics = evaluate(*features, probe=config.probe, seed=config.seed)
    with whole_file(run / "evaluation.json") as file:
        file.write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def compare_with_baselines(run: Path) -> dict[str, Metrics]:
    """Evaluate the trained encoder beside the same encoder untrained and beside raw pixels."""
    config, _ = _load(run)
    train, test = _labelled_parts(config)
    torch.manual_seed(config.seed)  # the weights that the run started from
    untrained = build_encoder(config.model, train.channels, config.data.augmentation.size)
    (train_x, train_y), (test_x, test_y) = (_features(untrained, config, part, _CPU) for part in (train, test))
    settings: Any = {"probe": config.probe, "seed": config.seed}
    return {
        "trained": evaluate_run(run),
        "untrained": evaluate(train_x, train_y, test_x, test_y, **settings),
        "raw pixels": evaluate(raw_pixels(train), train_y, raw_pixels(test), test_y, **settings),
    }


def draw(run: Path, *, queries: int = 5, neighbours: int = 8) -> list[Path]:
    """Draw the training curves, and random test images with the training images nearest by the cosine of features."""
    config, encoder = _load(run)
    curves, grid = run / "curves.png", run / "neighbours.png"
    plot_curves(run / "metrics.csv", curves)
    train, test = _labelled_parts(config)
    picks = torch.randperm(len(test), generator=torch.Generator().manual_seed(config.seed))[:queries]
    test = test.subset(picks)
    device = _device(config)
    encoder.to(device)
    (train_x, train_y), (test_x, test_y) = (_features(encoder, config, part, device) for part in (train, test))
    nearest, _ = nearest_neighbours(train_x, test_x, neighbours, "cosine")
    plot_neighbours(
        [test.image(i) for i in range(len(test))],
        [[train.image(i) for i in row] for row in nearest.tolist()],
        [test.classes[label] for label in test_y.tolist()],
        [[train.classes[label] for label in row] for row in train_y[nearest].tolist()],
        grid,
    )
    return [curves, grid]


class Embedded(NamedTuple):
    """What became of the files that were to be embedded."""

    embedded: int
    skipped: dict[str, str]  # images that cannot be read, and why
    found: Found


def embed_folder(
    run: Path,
    paths: Path | Sequence[Path],
    out: Path,
    *,
    on_bad_image: Literal["raise", "skip"] | None = None,
    value_range: str | None = None,
) -> Embedded:
    """Write a Parquet table of images: ``path``, and ``embedding``, the run's probed feature.

    The file appears once it is whole.

    Args:
        run: the run's folder.
        paths: folders, with all below them, and files.
        out: the table.
        on_bad_image: what to do with an unreadable one; by default the run's setting.
        value_range: of values deeper than 8 bits; by default the run's.

    Raises:
        DataError: there is no image; or, unless they are to be skipped, one cannot be read.
        ValueError: the folder is no finished run, or the table's name is not one of a Parquet file.
    """
    if out.suffix != ".parquet":
        raise ValueError(f"{out} will be a Parquet file: give it a name that ends in .parquet")
    config, encoder = _load(run)
    data, paths = config.data, [paths] if isinstance(paths, Path) else paths
    named = ", ".join(repr(str(path)) for path in paths)
    found = find_images(*paths)
    if not found.files:
        raise DataError(f"no images in {named}: give images, or folders that hold some. {found}".rstrip())
    _LOG.info("%s: %d images to embed. %s", named, len(found.files), found)
    skip = (on_bad_image or data.on_bad_image) == "skip"
    decoding = data.decoding if value_range is None else replace(data.decoding, value_range=value_range)
    check = check_files(found.files, decoding, whole=skip, num_workers=data.num_workers)
    decoding, unreadable = check.resolve(decoding)
    if unreadable and not skip:
        raise BadImageError(check.refusal("mend or remove them, or leave them out by --on-bad-image skip"))
    good = [path for path in found.files if path not in unreadable]
    if not good:
        raise DataError(f"none of the {len(found.files)} images in {named} can be read: {shown(unreadable)}")
    for path in good:
        if path != path.encode(errors="replace").decode():
            raise DataError(f"the name {path!r} is not UTF-8, which a table's text must be: rename the file")
    device = _device(config)
    images = ImageDataset(FileImages(good, decoding), channels=encoder.channels)
    with whole_file(out) as file:
        file.touch()  # fails now where it cannot be written, not after the work
        embeddings = _extract(encoder.to(device), config, images, device)
        table = pa.table({
            "path": good,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.flatten().numpy()), embeddings.shape[1]),
        })  # fmt: skip
        pq.write_table(table, file)
    return Embedded(len(good), unreadable, found)


def diagnose_run(
    run: Path, *, samples: int = 512, batch_size: int | None = None, epochs: int = 64, seed: int = 0
) -> Diagnosis:
    """Measure how wrong each estimator's gradient is at a run's weights, and why; see `torch_emc2.diagnosis`.

    Writes diagnosis.json, diagnosis.md and diagnosis.png.

    Args:
        run: its folder.
        samples: at most so many random training images, with two views each of the run's own augmentation.
        batch_size: samples a batch, by default the run's.
        epochs: the largest number of epochs averaged.
        seed: of the choice of images and of their views.

    Raises:
        ValueError: the folder is no finished run, or the samples do not fill a batch.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}: a lone sample has no negatives")
    config, encoder = _load(run)
    encoder.to(_device(config)).eval()
    data = config.data
    config, images = same_images(config, run)
    views = ContrastiveDataset(images, data.augmentation.transform(), seed=seed, on_bad_image=data.on_bad_image)
    picks = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
    with _advised(config):
        index, pairs = _two_views(views, picks)
    diagnosis = diagnose(
        encoder,
        pairs,
        config.temperature,
        config.batch_size if batch_size is None else batch_size,
        burn_in=config.emc2.burn_in,
        epochs=epochs,
        # Finite views have chains of their own, which met other views than these two.
        staleness=None if data.finite_views else _staleness(run, encoder, views, index, pairs, config.temperature),
    )
    with whole_file(run / "diagnosis.json") as file:
        file.write_text(json.dumps(asdict(diagnosis), indent=2, ensure_ascii=False) + "\n")
    with whole_file(run / "diagnosis.md") as file:
        file.write_text(to_markdown(diagnosis))
    with whole_file(run / "diagnosis.png") as file:
        plot_errors(diagnosis.errors, file)
    return diagnosis


def _load(run: Path) -> tuple[Config, Encoder]:
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{str(run)!r} is not a run's folder: it has no config.yaml")
    if not (run / "head.safetensors").is_file():
        raise ValueError(f"the run in {str(run)!r} is not finished: emc2 train {run / 'config.yaml'} --resume goes on")
    return read_config(str(run / "config.yaml")), load_encoder(run)


def _labelled_parts(config: Config) -> tuple[ImageDataset, ImageDataset]:
    data = config.data
    train, test = (evaluation_part(config, Path(config.out), split) for split in ("probe", "test"))
    if train.labels is None or test.labels is None:
        raise DataError(f"{data.name} has no labels to evaluate with; emc2 embed writes its embeddings")
    return train, test


def _features(encoder: Encoder, config: Config, part: ImageDataset, device: torch.device) -> tuple[Tensor, Tensor]:
    assert part.labels is not None
    return _extract(encoder, config, part, device), part.labels


def _extract(encoder: Encoder, config: Config, images: ImageDataset, device: torch.device) -> Tensor:
    transform = evaluation_transform(encoder.image_size)
    workers = config.data.num_workers
    with _advised(config):
        return extract_features(encoder.features, images, transform, device=device, num_workers=workers, progress=True)


@contextmanager
def _advised(config: Config) -> Iterator[None]:
    """Say how an image that turns out to be unreadable is left out."""
    try:
        yield
    except BadImageError as error:
        setting = f"data.on_bad_image: skip in {Path(config.out) / 'config.yaml'}"
        raise BadImageError(f"{error}: mend or remove it, or leave it out by {setting}") from error


def _two_views(views: ContrastiveDataset, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Draw two views of images ``ids``: the ids that can be read (k,), and (k, 2, c, s, s)."""
    batch = views.__getitems__([(0, i) for i in ids.tolist()])
    return batch.index, torch.stack([batch.first, batch.second], 1)


def _staleness(
    run: Path, encoder: Encoder, views: ContrastiveDataset, index: Tensor, pairs: Tensor, temperature: float
) -> Staleness | None:
    """Compare the scores in the run's last checkpoint, for the chains of samples ``index`` with views ``pairs``."""
    file = run / "checkpoints" / "last.ckpt"
    if not file.is_file():
        return None
    loss = load_checkpoint(file)["state_dict"].get("loss._extra_state", {})
    if "chains" not in loss:
        return None
    ids, scores = (loss["chains"][name][index] for name in ("ids", "scores"))
    if (ids != EMPTY).sum() < 2:
        return None
    carried_index, carried_pairs = _two_views(views, torch.unique(ids[ids != EMPTY]).long())
    row, chain = torch.isin(ids, carried_index).nonzero(as_tuple=True)
    place = torch.searchsorted(carried_index, ids[row, chain].long())
    anchors, carried = embed_views(encoder, pairs), embed_views(encoder, carried_pairs)
    return score_staleness(scores[row, chain], anchors[row], carried[place], temperature)


def _device(config: Config) -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() and config.accelerator != "cpu" else _CPU
