"""All that a training run is made of, as typed dataclasses; presets are YAML files of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from torch_emc2.config_tree import load_tree, refuse_extremes, refuse_groups, refuse_unknown, validate_tree
from torch_emc2.settings.images import Augmentation, Decoding
from torch_emc2.settings.losses import LOSSES, group_of, is_outside, require_loss, require_positive_weight
from torch_emc2.settings.model import ModelConfig

__all__ = [
    "Config",
    "DataConfig",
    "config_parser",
    "plain_words",
    "presets",
    "read_config",
    "recorded_config",
    "to_yaml",
]

_MOST_WORKERS = 1024


@dataclass
class DataConfig:
    """Where images come from and how views are drawn.

    Attributes:
        name: digits, fashion-mnist, cifar10, stl10, imagenet100, folder:PATH, or hf:OWNER/NAME or hf:PATH for what
            Hugging Face's `datasets` loads.
        root: folder that holds the named data sets, or takes them in.
        channels: 1 or 3; by default what the data set has.
        limit: pre-train on a random subset of at most this many images.
        augmentation: how the random views are drawn; its size is the encoder's input.
        decode_once: decode image files once and keep their pixels in one file below root; where its disk is too full,
            they are decoded each time.
        augment: who draws views: the workers, one at a time; or the device that trains, a batch at a time, of images of
            one size.
        finite_views: views precomputed for every image, stored below root; by default two are drawn anew each time.
        num_workers: processes that read images; results do not depend on it.
        on_bad_image: raise stops at an unreadable image and names it, skip leaves it out and counts it.
        background: the colour behind transparent pixels, such as white or #808080.
        value_range: the values that become black and white in images deeper than 8 bits, as min,max, or as low%,high%
            of each image's own; by default 16 bits that fill their range are taken, others refused.
        max_pixels: an image with more counts as unreadable, before it takes memory.
        shrink: larger images in files are shrunk as they are decoded, until their shorter side is so many times the
            views' size, which is faster for JPEG; by default they are as they are.
    """

    name: str = "digits"
    root: str = "data"
    channels: int | None = None
    limit: int | None = None
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(size=28))
    decode_once: bool = False
    augment: Literal["workers", "device"] = "workers"
    finite_views: int | None = None
    num_workers: int = 0
    on_bad_image: Literal["raise", "skip"] = "raise"
    background: str = "white"
    value_range: str | None = None
    max_pixels: int = 2**26
    shrink: float | None = None

    def __post_init__(self) -> None:
        kind, colon, path = self.name.partition(":")
        self.name, self.root = kind + colon + os.path.expanduser(path), os.path.expanduser(self.root)
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, or null for those of the data set, got {self.channels}")
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"limit must be at least 2, or null for all images, got {self.limit}")
        if not 0 <= self.num_workers <= _MOST_WORKERS:
            raise ValueError(f"num_workers must be from 0 to {_MOST_WORKERS}, got {self.num_workers}")
        if self.shrink is not None and not 2 <= self.shrink <= 1000:
            raise ValueError(f"shrink must be from 2 to 1000, or null for images as they are, got {self.shrink:g}")
        if self.finite_views is not None and self.finite_views < 2:
            raise ValueError(f"finite_views must be at least 2, or null for none, got {self.finite_views}")
        if self.finite_views is not None and self.decode_once:
            raise ValueError("finite_views are drawn once, and their images decoded once: leave decode_once at false")
        if self.finite_views is not None and self.augment == "device":
            raise ValueError("finite_views are drawn before training: leave augment at workers")
        _ = self.decoding  # refuses what it cannot use

    @property
    def decoding(self) -> Decoding:
        """What is made of files' pixels."""
        shrink_to = None if self.shrink is None else round(self.shrink * self.augmentation.size)
        return Decoding(self.background, self.value_range, self.max_pixels, shrink_to)


@dataclass
class OptimizerConfig:
    """The optimiser and its schedule: linear warm-up, then half a cosine to zero, step by step.

    Attributes:
        name: adam, adamw, sgd (with momentum) or lars.
        lr: peak learning rate.
        weight_decay: on all weights but biases and norms.
        momentum: of sgd and lars.
        warmup_epochs: length of the warm-up.
        clip: largest norm of the gradient, none by default.
        backbone_lr_scale: the backbone's share of the learning rate; the head has all of it.
        freeze_epochs: epochs at the start in which the head alone is trained, and the backbone kept as it is, its batch
            norms' statistics too; the schedule is of all epochs.
    """

    name: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup_epochs: float = 0
    clip: float | None = None
    backbone_lr_scale: float = 1.0
    freeze_epochs: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "momentum", "warmup_epochs", "backbone_lr_scale", "freeze_epochs"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or null for none, got {self.clip}")


# A group of settings for each estimator that has any, in their place among the fields.
_Groups: Any = make_dataclass(
    "_Groups",
    [
        *(
            (name, Any, None) for name in ("data", "model", "loss", "temperature", "positive_weight")
        ),  # which `Config` declares
        *(
            (group_of(name), settings, field(default_factory=settings))
            for name, settings in LOSSES.items()
            if settings is not None
        ),
    ],
)


@dataclass
class Config(_Groups):  # type: ignore[misc]
    """A training run.

    Attributes:
        loss: the estimator; each takes the same call, so this one word swaps it.
        temperature: 1 / β.
        positive_weight: κ, the positive's mass in the denominator beside the batch's negatives: 0 for none, 1 for
            InfoNCE's, global for its share among all of the data's; by default the estimator's own.
        batch_size: samples a step on each device.
        epochs: passes over the images.
        seed: of weights, order, views and chains.
        precision: of the encoder, as Lightning names it; similarities are always float32 or better.
        channels_last: each pixel's channels lie beside one another in the encoder. It rounds differently, and is faster
            where there is batch norm (docs/performance.md).
        accelerator: auto, cpu, gpu …, as Lightning names it.
        devices: how many, or auto.
        accumulate: batches a step of the optimiser; its gradient is the mean over them, or over those that are left at
            the end of an epoch. Chains move batch by batch: each is a visit of its samples.
        checkpoint_every_epochs: a checkpoint is kept each so many epochs, besides the last.
        checkpoint_every_steps: renew the last checkpoint each so many steps, by default at the end of an epoch only.
        log_every_steps: steps from one row of metrics.csv to the next; at least one row an epoch.
        probe: the linear probe that evaluates: logistic (L-BFGS, L2 chosen on held-out training images) or sgd (the
            paper's).
        out: folder of the run.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: str = "emc2"
    temperature: float = 0.07
    positive_weight: float | Literal["global"] | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 32
    epochs: int = 10
    seed: int = 0
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    channels_last: bool = False
    accelerator: str = "auto"
    devices: int | Literal["auto"] = 1
    accumulate: int = 1
    checkpoint_every_epochs: int | None = None
    checkpoint_every_steps: int | None = None
    log_every_steps: int = 10
    probe: Literal["logistic", "sgd"] = "logistic"
    out: str = "runs/train"

    def __post_init__(self) -> None:
        self.out = os.path.expanduser(self.out).rstrip("/") or self.out
        for name, value in (("out", self.out), ("data.name", self.data.name)):
            if value != value.encode(errors="replace").decode():
                raise ValueError(f"{name} {value!r} is not UTF-8, which config.yaml must be: rename the folder")
        refuse_extremes(asdict(self))
        require_loss(self.loss)
        if self.positive_weight is not None:
            self.positive_weight = require_positive_weight(self.positive_weight, sizes=())
        positive = ("batch_size", "epochs", "temperature", "accumulate", "log_every_steps")
        for name in (*positive, "checkpoint_every_epochs", "checkpoint_every_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2**32, got {self.seed}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, got {self.batch_size}: a lone sample has no negatives")
        if self.devices != "auto" and self.devices < 1:
            raise ValueError(f"devices must be at least 1, or auto for all there are, got {self.devices}")
        for name in ("warmup_epochs", "freeze_epochs"):
            if (value := getattr(self.optimizer, name)) > self.epochs:
                raise ValueError(f"optimizer.{name} must not exceed epochs ({self.epochs}), got {value}")


def presets() -> dict[str, Path]:
    """Return the presets that come with the package: name and YAML file."""
    folder = Path(str(files("torch_emc2.experiments").joinpath("presets")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def config_parser(prog: str) -> ArgumentParser:
    """Return a parser of every field of `Config`; unknown ones are errors."""
    usage = f"{prog} {'PRESET_OR_YAML [--resume] ' if prog == 'emc2 train' else ''}[--FIELD VALUE …]"
    parser = ArgumentParser(prog=prog, usage=usage, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Config)
    names = [action.dest for action in parser._actions]
    for action in parser._actions:
        if any(name.startswith(f"{action.dest}.") for name in names):  # a group, in whose place no file may be given
            action.help = argparse.SUPPRESS
    return parser


def plain_words(words: Sequence[str]) -> list[str]:
    """Write fields as they are called: on a command line a hyphen may stand for an underscore."""

    def plain(word: str) -> str:
        name, equals, value = word.removeprefix("--").partition("=")
        return f"--{name.replace('-', '_')}{equals}{value}" if word.startswith("--") else word

    return [plain(word) for word in words]


def read_config(preset: str, overrides: list[str] | None = None, prog: str = "emc2 train") -> Config:
    """Read a preset's name or a YAML file, and overrides as on the command line (``["--loss", "infonce"]``).

    ``folder:PATH``, and ``hf:…``, stand for the preset photos with these images, in a run that has their name.

    The config.yaml of a run's folder gives that folder as ``out``, wherever it was when the run began.

    Raises:
        ValueError: no such preset or file, an unknown field, or a value that does not fit. Or the file names a loss of
            the user's own, which would be imported, and the overrides do not.
    """
    known, words = presets(), plain_words(overrides or [])
    if preset.startswith(("folder:", "hf:")):
        name = os.path.basename(os.path.abspath(os.path.expanduser(preset.partition(":")[2])))
        preset, words = "photos", ["--data.name", preset, "--out", f"runs/{name or 'photos'}", *words]
    file = known.get(preset, Path(os.path.expanduser(preset)))
    if not os.path.isfile(file):  # Path's own raises where the name is too long
        meant = f"; folder:{preset} trains on a folder's images" if os.path.isdir(file) else ""
        if os.path.isfile(own := os.path.join(file, "config.yaml")):
            meant = f"; a run's is {own}"
        raise ValueError(f"{preset!r} is neither a preset ({', '.join(known)}) nor a YAML file{meant}")
    config = _read(file, words, prog)
    if is_outside(config.loss) and "--loss" not in (word.partition("=")[0] for word in words):
        raise ValueError(
            f"{str(file)!r} names the loss {config.loss}, a class that is imported only where you name it yourself: "
            f"give --loss {config.loss} too"
        )
    return config


def recorded_config(run: Path) -> Config:
    """Read the config.yaml of a run's folder, to know what it was: to train from it is for `read_config`.

    Raises:
        ValueError: it is damaged.
    """
    return _read(run / "config.yaml")


def _read(file: Path, words: Sequence[str] = (), prog: str = "emc2 train") -> Config:
    parser = config_parser(prog)
    try:
        try:
            text = file.read_text()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text: {error}") from error
        validate_tree(load_tree(text, file), Config)
        refuse_groups(words, Config)
        refuse_unknown([word.partition("=")[0] for word in words if word.startswith("--")], Config, "--")
        from_file = parser.parse_string(text or "{}")
        if file.name == "config.yaml" and (file.parent / "versions.json").is_file():
            from_file.out = str(file.parent)
        given = parser.parse_args(list(words), namespace=from_file)
        return Config(**parser.instantiate(given).as_dict())
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError(f"{str(file)!r} is nested too deeply, or an alias in it refers to itself") from error


def to_yaml(config: Config) -> str:
    """Write all fields as YAML, which `read_config` reads back."""
    return str(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))


def _plain(value: Any) -> Any:
    """Turn tuples to lists: YAML has no other."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
