"""Encoders side by side on one data set: all that their features can be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from torch_emc2.evaluation.accuracy import accuracies
from torch_emc2.evaluation.classes import classifiable
from torch_emc2.evaluation.label_free import label_free_numbers

__all__ = ["Evaluation", "Features", "compare", "to_text"]


class Features(NamedTuple):
    """What an encoder makes of a training part, a test part, and two random views of the first images of that."""

    train: Tensor  # (n, d)
    test: Tensor  # (q, d)
    views: Tensor  # (v, 2, d)


@dataclass(frozen=True)
class Evaluation:
    """Numbers of encoders on one data set.

    Attributes:
        data: its name.
        train_images: number of images that fit the probe, and are nearest neighbours.
        test_images: number of images held out.
        viewed_images: number of those of which alignment, uniformity, effective rank and retrieval are.
        numbers: of each encoder by name. "probe", "knn1_euclidean" … and "retrieval" are shares in [0, 1].
        notes: what was left out or assumed, and why: a line each.
    """

    data: str
    train_images: int
    test_images: int
    viewed_images: int
    numbers: dict[str, dict[str, float]]
    notes: list[str]


def compare(
    data: str,
    features: Mapping[str, Features],
    train_y: Tensor | None,
    test_y: Tensor | None,
    classes: Sequence[str],
    *,
    probe: Literal["logistic", "sgd"] = "logistic",
    seed: int = 0,
) -> Evaluation:
    """Measure what can be measured of each encoder's features, and note what cannot.

    Args:
        data: the data set's name.
        features: of each encoder by name.
        train_y: (n,), class numbers; None without labels.
        test_y: (q,), class numbers; None without labels.
        classes: the classes' names.
        probe: see `accuracies`.
        seed: of the probe.
    """
    (sizes,) = {(len(own.train), len(own.test), len(own.views)) for own in features.values()}
    viewed = sizes[2]
    rows, notes = classifiable(train_y, test_y, classes)
    if viewed < 2:
        notes.append("one test image: what needs no labels compares two, at least")
    numbers: dict[str, dict[str, float]] = {}
    for name, own in features.items():
        numbers[name] = {}
        if train_y is not None and test_y is not None and len(rows) > 0:
            measured, failures = accuracies(own.train, train_y, own.test[rows], test_y[rows], probe=probe, seed=seed)
            numbers[name] |= measured
            notes += failures
        if viewed > 1:
            numbers[name] |= label_free_numbers(own.test[:viewed], own.views)
    return Evaluation(data, *sizes, numbers, list(dict.fromkeys(notes)))


def to_text(evaluation: Evaluation) -> str:
    """Write an evaluation as lines: a row a number, a column an encoder."""
    encoders = evaluation.numbers
    lines = [
        f"images: {evaluation.train_images} training, {evaluation.test_images} test, "
        f"{evaluation.viewed_images} of them for what needs no labels",
        " " * 18 + "".join(f"{encoder:>14s}" for encoder in encoders),
    ]
    names = dict.fromkeys(name for numbers in encoders.values() for name in numbers)
    for name in names:
        lines.append(f"{name:18s}" + "".join(f"{_shown(name, numbers):>14s}" for numbers in encoders.values()))
    return "\n".join([*lines, *(f"Note: {note}" for note in evaluation.notes)])


def _shown(name: str, numbers: dict[str, float]) -> str:
    if name not in numbers:
        return "-"
    share = name in ("probe", "retrieval") or name.startswith("knn")
    return f"{100 * numbers[name]:.2f} %" if share else f"{numbers[name]:.3f}"
