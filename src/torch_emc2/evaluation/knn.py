"""Exact k-nearest-neighbour search and classification."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from torch_emc2.evaluation._checks import check_pair, class_numbers

__all__ = ["Metric", "knn_accuracy", "nearest_neighbours"]

Metric = Literal["cosine", "euclidean"]


def nearest_neighbours(
    train_x: Tensor, query_x: Tensor, k: int, metric: Metric = "euclidean", *, chunk_size: int = 512
) -> tuple[Tensor, Tensor]:
    """Find the k training rows nearest to every query, nearest first.

    Args:
        train_x: (n, d).
        query_x: (q, d).
        k: neighbours a query, at most n.
        metric: "euclidean", or "cosine": one minus the cosine of the angle; a zero vector is at 1 from everything.
        chunk_size: queries compared at once; memory is chunk_size * n * 8 bytes.

    Returns:
        Indices into `train_x`, int64 (q, k), and distances, float64 (q, k). Rows at equal distance come in any order.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, or k outside 1..n.
    """
    check_pair(train_x, query_x)
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k={k} neighbours of {len(train_x)} training rows; choose 1 <= k <= {len(train_x)}")
    # |x|^2 - 2 x.y + |y|^2 cancels for near neighbours far from the origin. Float64 about the training mean leaves
    # float32 features their precision, and is still a matrix product.
    train, query = train_x.double(), query_x.double()
    if metric == "cosine":
        train, query = (torch.nn.functional.normalize(x, dim=1) for x in (train, query))
    else:
        centre = train.mean(dim=0)
        train, query = train - centre, query - centre
    square_norms = train.square().sum(dim=1)
    indices, distances = [], []
    for chunk in torch.split(query, chunk_size):
        products = chunk @ train.T
        if metric == "cosine":
            all_distances = 1 - products
        else:
            all_distances = (chunk.square().sum(dim=1, keepdim=True) - 2 * products + square_norms).clamp(min=0).sqrt()
        nearest = all_distances.topk(k, dim=1, largest=False)
        indices.append(nearest.indices)
        distances.append(nearest.values)
    return torch.cat(indices), torch.cat(distances)


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    ks: Sequence[int] = (1, 10, 20, 200),
    metric: Metric = "euclidean",
    *,
    chunk_size: int = 512,
) -> dict[int, float]:
    """Classify by the majority among the k nearest training rows; between tied classes the nearest row decides.

    Args:
        train_x: (n, d).
        train_y: (n,), class numbers of any integer type, from 0 but not without gaps.
        test_x: (q, d).
        test_y: (q,), class numbers.
        ks: neighbourhood sizes.
        metric: see `nearest_neighbours`.
        chunk_size: see `nearest_neighbours`.

    Returns:
        Accuracy in [0, 1] for every k.

    Raises:
        ValueError: as `nearest_neighbours`, and for negative labels (missing ones).
    """
    train_y, test_y = class_numbers(train_x, train_y), class_numbers(test_x, test_y)
    for k in ks:
        if not 1 <= k <= len(train_x):
            raise ValueError(f"k={k} of ks={tuple(ks)} with {len(train_x)} training rows; choose 1 <= k <= n")
    indices, _ = nearest_neighbours(train_x, test_x, max(ks), metric, chunk_size=chunk_size)
    labels = train_y.to(indices.device)[indices]
    test_y = test_y.to(indices.device)
    return {k: (_majority(labels[:, :k]) == test_y).double().mean().item() for k in ks}


def _majority(labels: Tensor) -> Tensor:
    """(q, k) labels, nearest first -> (q,) winners."""
    ordered = labels.sort(dim=1).values
    labels = labels.contiguous()
    votes_of_own_class = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
    # argmax returns the first maximum, so the nearest row of the tied classes wins.
    winner = votes_of_own_class.argmax(dim=1, keepdim=True)
    return labels.gather(1, winner).squeeze(1)
