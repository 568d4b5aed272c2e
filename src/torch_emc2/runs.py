"""What one does with a finished run: evaluate its encoder, look at it, embed images with it, diagnose its gradients."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from torch_emc2.chains import EMPTY
from torch_emc2.config import Config, DataConfig, read_config
from torch_emc2.data import (
    BadImageError,
    ContrastiveDataset,
    DataError,
    FileImages,
    ImageDataset,
    decode_image,
    evaluation_transform,
    image_files,
    open_dataset,
)
from torch_emc2.diagnosis import Diagnosis, diagnose, embed_views, to_markdown
from torch_emc2.diagnostics import Staleness, score_staleness
from torch_emc2.evaluation import Evaluation, Features, compare, extract_features, nearest_neighbours, raw_pixels
from torch_emc2.files import load_checkpoint, whole_file
from torch_emc2.models import Encoder, build_encoder, load_encoder
from torch_emc2.report import plot_curves, plot_errors, plot_neighbours, thumbnail

__all__ = ["diagnose_run", "embed_folder", "evaluate_run", "evaluation_parts"]

_CPU = torch.device("cpu")

_PARTS: tuple[Literal["probe"], Literal["test"]] = ("probe", "test")

_VIEWED = 1000  # test images of which two random views are compared


def evaluation_parts(data: DataConfig) -> tuple[ImageDataset, ImageDataset]:
    """Open what an evaluation needs: the part that fits a probe, where it has labels, and the part that is held out."""
    train, test = (open_dataset(data.name, part, Path(data.root), channels=data.channels) for part in _PARTS)
    return train, test


def evaluate_run(run: Path, data: str | None = None, *, baselines: bool = False) -> tuple[Evaluation, list[Path]]:
    """Measure a run's encoder, and draw its curves, and random test images with the training images nearest to them.

    Where there are labels a probe is fitted, and its L2 strength chosen, on the training part; the test part is used
    once. Nearest is by the cosine of features.

    Args:
        run: its folder.
        data: another data set than the run's, named as in a config; the files that are written then have its name.
        baselines: measure the encoder as it was before training, and raw pixels, beside it.

    Returns:
        What was measured, and the files that were written.

    Raises:
        ValueError: the folder is no finished run, or its files or the data set's are damaged or not there.
    """
    config, encoder = _load(run)
    source = replace(config.data, name=data or config.data.name, channels=encoder.channels)
    train, test = evaluation_parts(source)
    # In random order, so that any first ones are a random choice.
    test = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(config.seed)))
    device = _device(config)
    encoders: dict[str, Callable[[Tensor], Tensor]] = {"trained": encoder.to(device).features}
    if baselines:
        torch.manual_seed(config.seed)  # the weights that the run started from
        untrained = build_encoder(config.model, encoder.channels, encoder.image_size).to(device)
        encoders |= {"untrained": untrained.features, "raw pixels": raw_pixels}
    features = {name: _features(encode, train, test, source, config.seed, device) for name, encode in encoders.items()}
    evaluation = compare(
        source.name, features, train.labels, test.labels, train.classes, probe=config.probe, seed=config.seed
    )

    own = source.name == config.data.name
    suffix = "" if own else f"-{_file_name(source.name)}"
    numbers, grid, curves = run / f"evaluation{suffix}.json", run / f"neighbours{suffix}.png", run / "curves.png"
    with whole_file(numbers) as file:
        file.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")
    with whole_file(grid) as file:
        _draw_neighbours(features["trained"], train, test, file)
    if not own:
        return evaluation, [numbers, grid]
    with whole_file(curves) as file:
        plot_curves(run / "metrics.csv", file)
    return evaluation, [numbers, grid, curves]


def embed_folder(
    run: Path, folder: Path, out: Path, *, on_bad_image: Literal["raise", "skip"] = "raise"
) -> tuple[int, int]:
    """Write a Parquet table of the images below a folder: ``path``, and ``embedding``, the run's probed feature.

    Returns the numbers of images embedded and left out as unreadable. The file appears once it is whole.

    Raises:
        DataError: there is no image; or, unless they are to be skipped, one cannot be read.
        ValueError: the folder is no finished run, or the table's name is not one of a Parquet file.
    """
    if out.suffix != ".parquet":
        raise ValueError(f"{out} will be a Parquet file: give it a name that ends in .parquet")
    config, encoder = _load(run)
    paths = image_files(folder)
    if not paths:
        raise DataError(f"no images below {str(folder)!r}: give a folder that holds some")
    good = paths
    if on_bad_image == "skip":
        good = [path for path in paths if _is_readable(path)]
        if not good:
            raise DataError(f"none of the {len(paths)} images below {str(folder)!r} can be read")
    for path in good:
        if path != path.encode(errors="replace").decode():
            raise DataError(f"the name {path!r} is not UTF-8, which a table's text must be: rename the file")
    device = _device(config)
    images = ImageDataset(FileImages(good), channels=encoder.channels)
    with whole_file(out) as file:
        file.touch()  # fails now where it cannot be written, not after the work
        embeddings = _extract(encoder.to(device), config, images, device)
        table = pa.table({
            "path": good,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.flatten().numpy()), embeddings.shape[1]),
        })  # fmt: skip
        pq.write_table(table, file)
    return len(good), len(paths) - len(good)


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
    images = open_dataset(
        data.name, "train", Path(data.root), channels=data.channels, limit=data.limit, seed=config.seed
    )
    views = ContrastiveDataset(images, data.augmentation.transform(), seed=seed, on_bad_image=data.on_bad_image)
    picks = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
    index, pairs = _two_views(views, picks)
    diagnosis = diagnose(
        encoder,
        pairs,
        config.temperature,
        config.batch_size if batch_size is None else batch_size,
        burn_in=0.5 if config.emc2.burn_in is None else config.emc2.burn_in,
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


def _features(
    encode: Callable[[Tensor], Tensor],
    train: ImageDataset,
    test: ImageDataset,
    data: DataConfig,
    seed: int,
    device: torch.device,
) -> Features:
    embed = partial(extract_features, encode, device=device, num_workers=data.num_workers, progress=True)
    still = evaluation_transform(data.augmentation.size)
    viewed = test.subset(torch.arange(min(len(test), _VIEWED)))
    pairs = _Pairs(ContrastiveDataset(viewed, data.augmentation.transform(), seed=seed))
    views = torch.unflatten(embed(pairs, torch.nn.Identity()), 0, (-1, 2))
    return Features(embed(train, still), embed(test, still), views)


class _Pairs:
    """Two random views of each image, one after the other."""

    def __init__(self, views: ContrastiveDataset) -> None:
        self.views = views

    def __len__(self) -> int:
        return 2 * len(self.views)

    def image(self, index: int) -> Tensor:
        return self.views.view(0, *divmod(index, 2))


def _draw_neighbours(
    features: Features, train: ImageDataset, test: ImageDataset, out: Path, queries: int = 5, neighbours: int = 8
) -> None:
    neighbours = min(neighbours, len(train))
    nearest, _ = nearest_neighbours(features.train, features.test[:queries], neighbours, "cosine")
    own = others = None
    if train.labels is not None and test.labels is not None:
        own = [test.classes[label] for label in test.labels[:queries].tolist()]
        others = [[train.classes[label] for label in row] for row in train.labels[nearest].tolist()]
    plot_neighbours(
        [thumbnail(test.image(i)) for i in range(len(nearest))],
        [[thumbnail(train.image(i)) for i in row] for row in nearest.tolist()],
        own,
        others,
        out,
    )


def _file_name(data: str) -> str:
    """Return a short name for a data set; that of a folder differs from those of others which end alike."""
    if not data.startswith("folder:"):
        return data
    path = os.path.abspath(os.path.expanduser(data.removeprefix("folder:")))
    plain = re.sub(r"[^\w.-]+", "-", os.path.basename(path), flags=re.ASCII)[:40]
    return f"{plain}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def _extract(encoder: Encoder, config: Config, images: ImageDataset, device: torch.device) -> Tensor:
    transform = evaluation_transform(encoder.image_size)
    workers = config.data.num_workers
    return extract_features(encoder.features, images, transform, device=device, num_workers=workers, progress=True)


def _two_views(views: ContrastiveDataset, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Draw two views of images ``ids``: the ids that can be read (k,), and (k, 2, c, s, s)."""
    batch = views.__getitems__([(0, i) for i in ids.tolist()])
    return batch.index, torch.stack([batch.first, batch.second], 1)


def _staleness(
    run: Path, encoder: Encoder, views: ContrastiveDataset, index: Tensor, pairs: Tensor, temperature: float
) -> Staleness | None:
    """Compare what the run's last checkpoint has stored, for the chains of samples ``index`` with views ``pairs``."""
    file = run / "checkpoints" / "last.ckpt"
    if not file.is_file():
        return None
    chains = load_checkpoint(file)["state_dict"].get("loss._extra_state", {}).get("chains", {})
    if "similarities" not in chains:
        return None
    ids, similarities = (chains[name][index] for name in ("ids", "similarities"))
    if (ids != EMPTY).sum() < 2:
        return None
    carried_index, carried_pairs = _two_views(views, torch.unique(ids[ids != EMPTY]).long())
    row, chain = torch.isin(ids, carried_index).nonzero(as_tuple=True)
    place = torch.searchsorted(carried_index, ids[row, chain].long())
    anchors, carried = embed_views(encoder, pairs), embed_views(encoder, carried_pairs)
    return score_staleness(similarities[row, chain] / temperature, anchors[row], carried[place], temperature)


def _device(config: Config) -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() and config.accelerator != "cpu" else _CPU


def _is_readable(path: str) -> bool:
    try:
        decode_image(path)
    except BadImageError:
        return False
    return True
