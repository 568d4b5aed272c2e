"""The experiments by name: which cells each is made of. Every one takes any data set of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch_emc2.config import Config, read_config
from torch_emc2.config_tree import load_tree
from torch_emc2.settings.losses import Carry

__all__ = [
    "EXPERIMENTS",
    "SCALES",
    "Experiment",
    "Scale",
    "Tuned",
    "Variant",
    "base_config",
    "methods",
    "override",
    "read_tuned",
]

Tuned = Mapping[str, Mapping[str, float]]
"""For each method the fields that a search chose for it, such as ``{"InfoNCE": {"temperature": 0.1}}``."""


class Variant(NamedTuple):
    """What is run once a seed.

    Attributes:
        series: the line that it belongs to.
        x: its place on the experiment's axis.
        config: the run; seed and folder are set by the runner.
    """

    series: str
    x: float | str
    config: Config


@dataclass(frozen=True)
class Experiment:
    """A named experiment.

    Attributes:
        title: what it shows.
        axis: what `Variant.x` is.
        variants: from the base config and what a search chose.
        figure: ``"curves"`` over time and over samples, ``"sweep"`` over the axis, or the ``"gradient"`` study.
        dataset: the default.
    """

    title: str
    axis: str
    variants: Callable[[Config, Tuned], Iterator[Variant]]
    figure: Literal["curves", "sweep", "gradient"] = "sweep"
    dataset: str = "stl10"


@dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
        overrides: of the data set's preset.
        labelled: at most so many labelled images fit the probe, and at most so many are classified by it.
        points: of a curve.
    """

    overrides: tuple[str, ...]
    labelled: int | None
    points: int


SCALES = {
    "smoke": Scale(
        (
            *("--data.limit", "256", "--epochs", "1", "--optimizer.warmup_epochs", "0", "--data.num_workers", "0"),
            *("--model.backbone", "test_resnet", "--model.hidden_dim", "32", "--model.out_dim", "16"),
        ),
        labelled=300,
        points=1,
    ),
    "small": Scale(
        (
            *("--data.limit", "5000", "--epochs", "4", "--optimizer.warmup_epochs", "0.5", "--data.num_workers", "0"),
            *("--model.backbone", "test_resnet", "--model.hidden_dim", "256", "--model.out_dim", "128"),
        ),
        labelled=5_000,
        points=4,
    ),
    "full": Scale((), labelled=None, points=20),
}


@cache
def methods() -> dict[str, dict[str, Any]]:
    """Return the settings that make each method, by its title; the estimators are imported only here."""
    from torch_emc2.losses.registry import ESTIMATORS

    return {
        method.title: {"loss": row.name, **{f"{row.group}.{name}": value for name, value in method.fields.items()}}
        for row in ESTIMATORS.values()
        for method in row.methods
    }


def _kernels() -> list[str]:
    return [title for title, fields in methods().items() if fields["loss"] == "emc2"]


def base_config(dataset: str, scale: str, overrides: list[str]) -> Config:
    """Return the preset of a data set at a scale, with the user's own overrides last.

    Raises:
        ValueError: an unknown field, or a value that does not fit.
    """
    preset = {"digits": "quickstart", "stl10": "stl10-b32"}.get(dataset, dataset)
    if ":" in dataset:  # a folder, or of Hugging Face
        preset = "stl10-b32"
    overrides = [*SCALES[scale].overrides, "--data.name", dataset, *overrides]
    return read_config(preset, overrides, prog="emc2 experiment")


def read_tuned(file: Path) -> Tuned:
    """Read the best.yaml of a search.

    Raises:
        ValueError: it is none.
    """
    tuned: Any = load_tree(file.read_text(), file)
    if not isinstance(tuned, dict) or not all(isinstance(fields, dict) for fields in tuned.values()):
        raise ValueError(f"{str(file)!r} is not a search's best.yaml: it must map methods to fields")
    for name, value in (item for fields in tuned.values() for item in fields.items()):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} in {str(file)!r} must be a number, got {value!r}")
    return tuned


def override(config: Any, fields: Mapping[str, Any]) -> Any:
    """Return a copy of nested dataclasses with fields such as ``{"optimizer.lr": 0.1}`` replaced."""
    for name, value in fields.items():
        first, _, rest = name.partition(".")
        if not hasattr(config, first):
            raise ValueError(f"no field {name!r} in {type(config).__name__}: emc2 train --help lists them")
        inner = getattr(config, first)
        config = replace(config, **{first: override(inner, {rest: value}) if is_dataclass(inner) and rest else value})
    return config


def _method(base: Config, tuned: Tuned, name: str, **fields: Any) -> Config:
    own = {key.replace("__", "."): value for key, value in fields.items()}
    config: Config = override(base, {**tuned.get(name, {}), **methods()[name], **own})
    return config


def _methods(batch_size: int) -> Callable[[Config, Tuned], Iterator[Variant]]:
    def variants(base: Config, tuned: Tuned) -> Iterator[Variant]:
        for name in methods():
            yield Variant(name, batch_size, _method(base, tuned, name, batch_size=batch_size))

    return variants


def _batch_sizes(base: Config, tuned: Tuned) -> Iterator[Variant]:
    """Without Negative Cache, which encodes a share of the data set each step: no comparison at equal samples."""
    for size, name in product((4, 16, 64, 256), methods()):
        if name != "Negative Cache":
            yield Variant(name, size, _method(base, tuned, name, batch_size=size))


def _chains(base: Config, tuned: Tuned) -> Iterator[Variant]:
    for name, chains in product(_kernels(), (1, 2, 4, 8)):
        yield Variant(name, chains, _method(base, tuned, name, emc2__num_chains=chains))


def _carry(base: Config, tuned: Tuned) -> Iterator[Variant]:
    """With group norm: policies encode different images together, which batch norm would not forget."""
    for name, carry in product(_kernels(), get_args(Carry)):
        yield Variant(name, carry, _method(base, tuned, name, emc2__carry=carry, model__norm="group"))


def _burn_in(base: Config, tuned: Tuned) -> Iterator[Variant]:
    for share in (0.0, 0.25, 0.5, 0.75, 0.9):
        yield Variant("EMC²", share, _method(base, tuned, "EMC²", emc2__burn_in=share))


def _stale(base: Config, tuned: Tuned) -> Iterator[Variant]:
    for (label, carry), share in product({"fresh": "encode", "stale": "encode_if_used"}.items(), (0.0, 0.5, 0.9)):
        fields = {"emc2__carry": carry, "emc2__burn_in": share, "model__norm": "group"}  # as in `_carry`
        yield Variant(f"{label} scores", share, _method(base, tuned, "EMC²", **fields))


def _pre_augmented(base: Config, tuned: Tuned) -> Iterator[Variant]:
    from torch_emc2.data import open_dataset

    data = base.data
    images = len(open_dataset(data.name, "train", Path(data.root), channels=data.channels, limit=data.limit))
    for part, name in product((4, 2, 1), methods()):  # more epochs of fewer images: as many samples for each size
        size = images // part
        fields = {
            "data__limit": size,
            "data__finite_views": 2,
            "batch_size": min(256, size),
            "epochs": part * base.epochs,
        }
        warmup = part * base.optimizer.warmup_epochs
        yield Variant(name, size, _method(base, tuned, name, optimizer__warmup_epochs=warmup, **fields))


def _gradient_study(base: Config, tuned: Tuned) -> Iterator[Variant]:
    """The paper's settings: 500 images, two fixed views each, no norms, SGD at β = 5 and b = 4."""
    fields = {"data.limit": min(500, base.data.limit or 500), "data.finite_views": 2, "model.norm": "none"}
    fields |= {"optimizer.name": "sgd", "optimizer.lr": 1e-3, "optimizer.momentum": 0.0, "optimizer.warmup_epochs": 0.0}
    fields |= {
        "epochs": min(10, base.epochs),
        "batch_size": 4,
        "temperature": 0.2,
        "negative_cache.refresh_fraction": 0.1,
    }
    for name in methods():
        yield Variant(name, 4, override(_method(base, {}, name), fields))


def _search(base: Config, tuned: Tuned) -> Iterator[Variant]:
    """A cross around the preset's learning rate and temperature, the same for every method."""
    for name, (rate, heat) in product(methods(), ((1, 1), (1 / 3, 1), (3, 1), (10, 1), (1, 0.5), (1, 2))):
        lr = base.optimizer.lr if rate == 1 else float(f"{rate * base.optimizer.lr:.2g}")
        temperature = heat * base.temperature
        config = _method(base, {}, name, optimizer__lr=lr, temperature=temperature)
        yield Variant(name, f"lr {lr:g}, temperature {temperature:g}", config)


EXPERIMENTS = {
    "search": Experiment(
        "Every method's learning rate and temperature, by the probe's accuracy on a validation part",
        "settings",
        _search,
    ),
    "small-batch": Experiment(
        "Accuracy against wall time and samples, b = 32 (paper, figures 1 and 5)", "batch size", _methods(32), "curves"
    ),
    "large-batch": Experiment(
        "Accuracy against wall time and samples, b = 256 (paper, figure 5)", "batch size", _methods(256), "curves"
    ),
    "pre-augmented": Experiment(
        "Sizes of a data set with two fixed views an image, b = 256 (paper, figure 3)", "images", _pre_augmented
    ),
    "burn-in": Experiment("Burn-in P (paper, figure 4)", "burn-in", _burn_in),
    "gradient-study": Experiment(
        "Exact loss and gradient along the way, b = 4", "batch size", _gradient_study, "gradient"
    ),
    "imagenet100": Experiment(
        "Linear probe and 1-NN at b = 256 (paper, ImageNet-100)", "batch size", _methods(256), "curves", "imagenet100"
    ),
    "batch-size": Experiment("Batch size at equal samples", "batch size", _batch_sizes),
    "chains": Experiment("Chains a sample", "chains", _chains),
    "carry": Experiment("Who supplies the carried negative", "carry", _carry),
    "stale": Experiment("Fresh and stored scores of carried negatives", "burn-in", _stale),
}
