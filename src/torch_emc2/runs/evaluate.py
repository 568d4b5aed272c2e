"""How good a run's encoder is: numbers of its features, and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torch_emc2.config import DataConfig
from torch_emc2.data import ContrastiveDataset, ImageDataset, RandomView, evaluation_transform
from torch_emc2.evaluation import Evaluation, Features, compare, extract_features, raw_pixels
from torch_emc2.files import whole_file
from torch_emc2.models import build_encoder
from torch_emc2.runs.finished import leave_out_advised, load_run
from torch_emc2.runs.gallery import of_images
from torch_emc2.runs.neighbours import draw_neighbours, nearest_in
from torch_emc2.runs.pictures import plot_curves
from torch_emc2.settings.images import file_name_of
from torch_emc2.training.run_images import evaluation_parts

__all__ = ["evaluate_run"]

_VIEWED = 1000  # test images of which two random views are compared
_QUERIES, _NEIGHBOURS = 5, 8  # in the picture


def evaluate_run(
    run: Path, data: str | None = None, *, value_range: str | None = None, baselines: bool = False
) -> tuple[Evaluation, list[Path]]:
    """Measure a run's encoder, and draw its curves, and random test images with the training images nearest to them.

    Where there are labels a probe is fitted, and its L2 strength chosen, on the training part; the test part is used
    once. Nearest is by the cosine of features.

    Args:
        run: its folder.
        data: another data set than the run's, named as in a config; the files that are written then have its name.
        value_range: of values deeper than 8 bits; by default the run's; one that was found in its images is not that
            of another data set.
        baselines: measure the encoder as it was before training, and raw pixels, beside it.

    Returns:
        What was measured, and the files that were written.

    Raises:
        ValueError: the folder is no finished run, or its files or the data set's are damaged or not there.
    """
    config, encoder, device = load_run(run)
    own = data in (None, config.data.name)
    value_range = value_range or config.data.value_range
    source = replace(config.data, name=data or config.data.name, channels=encoder.channels, value_range=value_range)
    train, test = evaluation_parts(replace(config, data=source), run, own=own)
    # In random order, so that any first ones are a random choice.
    test = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(config.seed)))
    encoders: dict[str, Callable[[Tensor], Tensor]] = {"trained": encoder.features}
    if baselines:
        torch.manual_seed(config.seed)  # the weights that the run started from
        before = build_encoder(config.model, encoder.channels, encoder.image_size).to(device)
        name = "pretrained" if config.model.pretrained else "untrained"
        encoders |= {name: before.features, "raw pixels": raw_pixels}
    with leave_out_advised(run):
        features = {
            name: _features(encode, train, test, source, config.seed, device) for name, encode in encoders.items()
        }
    evaluation = compare(
        source.name, features, train.labels, test.labels, train.classes, probe=config.probe, seed=config.seed
    )

    if source.name.startswith("folder:") and "probe" in evaluation.numbers["trained"]:
        evaluation.notes.append(
            "the classes are the folders: where those are albums or dates, what is alike is in several, and retrieval "
            "of the other view says more than probe and neighbours"
        )
        if "." in train.classes:
            evaluation.notes.append("images that lie beside the folders count as a class of their own, '.'")

    suffix = "" if own else f"-{file_name_of(source.name)}"
    numbers, grid, curves = run / f"evaluation{suffix}.json", run / f"neighbours{suffix}.png", run / "curves.png"
    with whole_file(numbers) as file:
        file.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")
    _draw_neighbours(features["trained"], train, test, grid)
    if suffix:
        return evaluation, [numbers, grid]
    with whole_file(curves) as file:
        plot_curves(run / "metrics.csv", file)
    return evaluation, [numbers, grid, curves]


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
    pairs = _Pairs(ContrastiveDataset(viewed, RandomView(data.augmentation), seed=seed))
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


def _draw_neighbours(features: Features, train: ImageDataset, test: ImageDataset, out: Path) -> None:
    gallery, queries = of_images(train, features.train, "training"), of_images(test, features.test, "test")
    found = nearest_in(gallery, queries.subset(torch.arange(min(_QUERIES, len(test)))), _NEIGHBOURS)
    draw_neighbours(found, out, "Random test images, and the training images nearest to them")
