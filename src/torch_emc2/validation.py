"""What a loss may be called with: one rank's batch, valid and normalised, or an error that names what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_emc2.unit import unit_vectors

__all__ = ["Inputs", "Towers", "unique_ids", "validate_inputs", "validate_range"]

Towers = Literal[1, 2]


@dataclass(frozen=True)
class Inputs:
    """One rank's input of a call.

    Attributes:
        size: samples b.
        views: views of a sample on each side.
        vectors: for each side (views · b, d) unit vectors, view by view.
        ids: for each side (b,) or (b, views) int64, if they were given; or None.
        hard: hard negatives, (k, d) unit vectors for all rows or (b, k, d) for each sample, or None.
        hard_ids: (k,) or (b, k) int64, -1 where they have none; or None.
        same: (b, b) bool, or None.
        labels: (b,) int64, or None.
        slow: for each side (views · b, d) unit vectors by a momentum encoder, without gradient; or None.
    """

    size: int
    views: int
    vectors: tuple[Tensor, ...]
    ids: tuple[Tensor | None, ...]
    hard: Tensor | None = None
    hard_ids: Tensor | None = None
    same: Tensor | None = None
    labels: Tensor | None = None
    slow: tuple[Tensor, ...] | None = None


def validate_inputs(
    x: Tensor,
    y: Tensor | None,
    index: Tensor | None,
    y_index: Tensor | None = None,
    hard: Tensor | None = None,
    hard_index: Tensor | None = None,
    same: Tensor | None = None,
    labels: Tensor | None = None,
    slow: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    towers: Towers = 1,
    needs_index: bool = False,
) -> Inputs:
    """Validate one rank's arguments of a call (`ContrastiveLoss.forward` says what they are), and normalise embeddings.

    Raises:
        ValueError, TypeError: an argument cannot be used.
    """
    for name, value in (("y", y), ("hard", hard), ("same", same)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    _validate_views(x, y, towers)
    if index is None and needs_index:
        call = "loss(x, y, index)" if x.ndim == 2 else "loss(x, index=index) for x of (b, views, d)"
        raise ValueError(f"this loss needs index, the ids of the batch's samples: {call}")
    size, dim, views = len(x), x.shape[-1], x.shape[1] if y is None else 3 - towers
    vectors = _normalised(x, y, towers, "x", "y")
    by_slow = None if slow is None else _validate_slow(slow, x, y, towers, vectors[0].dtype)
    if index is not None:
        index = _validate_index("index", index, size, views)
    if y_index is not None and towers == 1:
        raise ValueError("y_index is for towers=2; with towers=1 give index (b, views), an id a view")
    if y_index is not None:
        y_index = _validate_index("y_index", y_index, size, views)
    hard_ids = None
    if hard is not None:
        hard, hard_ids = _validate_hard(hard, hard_index, size, dim, x)
    elif hard_index is not None:
        raise ValueError("hard_index without hard: give the hard negatives' embeddings too")
    if same is not None:
        if same.shape != (size, size) or same.dtype != torch.bool:
            raise ValueError(f"same must be ({size}, {size}) bool, got {tuple(same.shape)} {same.dtype}")
        same = same.to(x.device)
    if labels is not None:
        _validate_integers("labels", labels)
        if labels.shape != (size,):
            raise ValueError(f"labels must be ({size},), one a sample, got {tuple(labels.shape)}")
        labels = labels.to(x.device, torch.int64)
    ids = (index,) if towers == 1 else (index, index if y_index is None else y_index)
    return Inputs(size, views, vectors, ids, hard, hard_ids, same, labels, by_slow)


def unique_ids(ids: Tensor, num_samples: int | None) -> Tensor:
    """Validate ids of any shape, as a loss is called with, and return the distinct ones (k,), int64."""
    _validate_integers("index", ids)
    ids = torch.unique(ids.to(torch.int64))
    if len(ids):
        validate_range("index", ids.tolist(), num_samples)
    return ids


def validate_range(name: str, ids: list[int], num_samples: int | None) -> None:
    """Raise IndexError if one of some ids, at least one, is not in [0, num_samples), or without that is -1."""
    if num_samples is None:
        if -1 in ids:
            raise IndexError(f"{name} -1 is reserved, it marks an empty chain: number that sample otherwise")
        return
    low, high = min(ids), max(ids)
    if low < 0 or high >= num_samples:
        raise IndexError(
            f"{name} must be at least 0 and below num_samples={num_samples}, got {low if low < 0 else high}"
        )


def _validate_views(x: Tensor, y: Tensor | None, towers: Towers) -> None:
    if y is None:
        if towers == 2:
            raise ValueError("towers=2 needs both sides: loss(x, y, index)")
        if x.ndim != 3 or x.shape[1] < 2:
            raise ValueError(f"x without y must be (b, views, d) with 2 views or more, got {tuple(x.shape)}")
    elif not y.is_floating_point() and y.shape != x.shape:
        raise TypeError(
            f"y must be embeddings as x, {tuple(x.shape)}, got {y.dtype} {tuple(y.shape)}: labels are given by name, "
            "labels=, ids third or as index=; more than two views are x alone, (b, views, d)"
        )
    elif x.ndim != 2 or x.shape != y.shape:
        views = "; with more than two views x alone is (b, views, d): loss(x, index=index)" if x.ndim == 3 else ""
        raise ValueError(f"x and y must both be (b, d), got {tuple(x.shape)} and {tuple(y.shape)}{views}")
    y = x if y is None else y
    if not x.is_floating_point() or x.dtype != y.dtype:
        raise TypeError(f"x and y must share a floating-point dtype, got {x.dtype} and {y.dtype}")


def _normalised(x: Tensor, y: Tensor | None, towers: Towers, *names: str) -> tuple[Tensor, ...]:
    """Return unit vectors of each side, (views · b, d)."""
    size = len(x)
    if y is None:
        whole = x.transpose(0, 1).flatten(0, 1)
        return (unit_vectors(whole, lambda row: f"{names[0]}[{row % size}, {row // size}]"),)
    z = unit_vectors(torch.cat([x, y]), lambda row: f"{names[row // size]}[{row % size}]")
    return (z,) if towers == 1 else torch.split(z, size)


def _validate_slow(slow: object, x: Tensor, y: Tensor | None, towers: Towers, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return unit vectors of each side, in the order of those of x and y, without gradient."""
    given, like = (slow, (x, y)) if y is not None else ((slow,), (x,))
    names = ("slow",) if y is None else ("slow[0]", "slow[1]")
    if not isinstance(given, tuple | list) or len(given) != len(like):
        raise TypeError(f"slow must be a pair of tensors, of x and of y, got {type(slow).__name__}")
    for name, each in zip(names, given, strict=True):
        if not isinstance(each, Tensor) or not each.is_floating_point():
            what = each.dtype if isinstance(each, Tensor) else type(each).__name__
            raise TypeError(f"{name} must be embeddings, a tensor of a floating-point dtype, got {what}")
        if each.shape != x.shape:
            raise ValueError(f"{name} must be {tuple(x.shape)}, one for each embedding, got {tuple(each.shape)}")
        if each.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {each.device}")
    first, *second = (each.detach().to(dtype) for each in given)
    return _normalised(first, second[0] if second else None, towers, *names)


def _validate_index(name: str, index: Tensor, size: int, views: int) -> Tensor:
    _validate_integers(name, index)
    if index.shape != (size,) and (views == 1 or index.shape != (size, views)):
        by_view = "" if views == 1 else f", or ({size}, {views}) with an id a view"
        raise ValueError(f"{name} must be ({size},){by_view}, got {tuple(index.shape)}")
    return index.to(torch.int64)


def _validate_hard(hard: Tensor, index: Tensor | None, size: int, dim: int, x: Tensor) -> tuple[Tensor, Tensor]:
    if hard.ndim not in (2, 3) or hard.shape[-1] != dim or (hard.ndim == 3 and len(hard) != size):
        raise ValueError(f"hard must be (k, {dim}), for all rows, or ({size}, k, {dim}), got {tuple(hard.shape)}")
    if hard.device != x.device:
        raise ValueError(f"hard must be on the device of x, {x.device}, got {hard.device}")
    if hard.dtype != x.dtype:
        raise TypeError(f"hard must have the dtype of x, {x.dtype}, got {hard.dtype}")
    shape = hard.shape[:-1]
    if index is None:
        ids = torch.full(shape, -1, device=x.device)
    else:
        _validate_integers("hard_index", index)
        if index.shape != shape:
            raise ValueError(f"hard_index must be {tuple(shape)}, an id each, got {tuple(index.shape)}")
        ids = index.to(x.device, torch.int64)
    of_sample = lambda row: f"hard[{row}]" if hard.ndim == 2 else f"hard[{row // shape[1]}, {row % shape[1]}]"  # noqa: E731
    return unit_vectors(hard.reshape(-1, dim), of_sample).view(*shape, dim), ids


def _validate_integers(name: str, index: object) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(index).__name__}")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {index.dtype}")
