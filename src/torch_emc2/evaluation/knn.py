"""Exact k-nearest-neighbour search and classification."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torch_emc2.evaluation._checks import check_pair, class_numbers

__all__ = ["Metric", "knn_accuracy", "nearest_neighbours"]

Metric = Literal["cosine", "euclidean"]

_SPARE = 64  # candidates beyond k, among which float32 may err
_BLOCK = 2**19  # numbers that are float64 at once: they stay in the processor's cache
_TINY = torch.finfo(torch.float64).tiny


@torch.no_grad()
def nearest_neighbours(
    train_x: Tensor, query_x: Tensor, k: int, metric: Metric = "euclidean", *, chunk_size: int = 512
) -> tuple[Tensor, Tensor]:
    """Find the k training rows nearest to every query, nearest first.

    Float32 products find k + 64 candidates, distances in float64 order them. A query for which another row could be
    nearer still, within the bound of float32's rounding, is searched for by float64 products: features that float32
    cannot tell apart, such as a collapsed encoder's, cost more time, not exactness.

    Args:
        train_x: (n, d).
        query_x: (q, d).
        k: neighbours a query, at most n.
        metric: "euclidean", or "cosine": one minus the cosine of the angle; a zero vector is at 1 from everything.
        chunk_size: queries compared at once; memory is (chunk_size + d) * n * 4 bytes, or 8 where float64 is needed.

    Returns:
        Indices into `train_x`, int64 (q, k), and distances, float64 (q, k). Rows at equal distance come in any order,
        and of those that share the k-th place any may be left out.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, or k outside 1..n.
    """
    check_pair(train_x, query_x)
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k={k} neighbours of {len(train_x)} training rows; choose 1 <= k <= {len(train_x)}")
    if torch.get_float32_matmul_precision() != "highest" or torch.is_autocast_enabled(train_x.device.type):
        return _search(train_x, query_x, k, metric, torch.float64, chunk_size)[:2]
    indices, distances, certain = _search(train_x, query_x, k, metric, torch.float32, chunk_size)
    if not certain.all():
        again = _search(train_x, query_x[~certain], k, metric, torch.float64, chunk_size)
        indices[~certain], distances[~certain] = again[:2]
    return indices, distances


def _search(
    train_x: Tensor, query_x: Tensor, k: int, metric: Metric, dtype: torch.dtype, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices, distances, and (q,) whether no other row can be nearer, by products of ``dtype``."""
    # |x|^2 - 2 x.y + |y|^2 cancels for near neighbours far from the origin, but not about the training mean.
    centre = None
    if metric == "euclidean":
        centre = train_x.mean(dim=0, dtype=torch.promote_types(train_x.dtype, dtype))
    train, query = _points(train_x, centre, dtype), _points(query_x, centre, dtype)
    squares, query_squares = (torch.linalg.vector_norm(x, dim=1).square() for x in (train, query))
    # Of a sum of d products of such numbers, beside a half square; the second term is of those too small to be any.
    largest = torch.maximum(squares.max(), query_squares.max()).double()
    rounding = (train.shape[1] + 4) * (torch.finfo(dtype).eps * largest + 2 * torch.finfo(dtype).tiny)
    half = torch.zeros_like(squares) if centre is None else squares / 2
    size = min(k + _SPARE, len(train))
    indices, distances, certain = [], [], []
    for chunk, exact, square in zip(
        *(torch.split(x, chunk_size) for x in (query, query_x, query_squares)), strict=True
    ):
        nearness, rows = torch.addmm(-half, chunk, train.T).topk(size, dim=1)
        nearest = _distances(train_x, exact, rows, metric).topk(k, dim=1, largest=False)
        indices.append(rows.gather(1, nearest.indices))
        distances.append(nearest.values)
        last = nearest.values[:, -1]  # of the k; its nearness is above that of all rows that are no candidates
        last = 1 - last if centre is None else (square - last.square()) / 2
        certain.append((last >= nearness[:, -1] + rounding) | (size == len(train)))
    return torch.cat(indices), torch.cat(distances), torch.cat(certain)


def _points(x: Tensor, centre: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Move rows by the centre, or bring them to unit length where there is none; rounded to ``dtype`` once."""
    points = torch.empty(x.shape, dtype=dtype, device=x.device)
    size = max(1, _BLOCK // x.shape[1])
    for block, rows in zip(torch.split(points, size), torch.split(x, size), strict=True):
        if centre is None:
            block.copy_(normalize(rows.double(), dim=1, eps=_TINY))
        else:
            block.copy_((rows if rows.dtype == dtype else rows.double()) - centre)
    return points


def _distances(train_x: Tensor, query_x: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """Return float64 (q, k) of queries from (q, k) training rows each."""
    (queries, k), width = rows.shape, train_x.shape[1]
    distances = query_x.new_empty(queries, k, dtype=torch.float64)
    # Filled again and again: to allocate them for every block takes several times as long, and leaves memory in pieces.
    near = train_x.new_empty(min(queries, max(1, _BLOCK // (k * width))), k, width)
    exact = torch.empty_like(near, dtype=torch.float64)
    blocks = (torch.split(x, len(near)) for x in (query_x, rows, distances))
    for block, own, result in zip(*blocks, strict=True):
        torch.index_select(train_x, 0, own.flatten(), out=near[: len(own)].flatten(0, 1))
        x, y = block.double()[:, None], exact[: len(own)].copy_(near[: len(own)])
        if metric == "euclidean":
            result.copy_(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")[:, 0])
        else:
            lengths = torch.linalg.vector_norm(x, dim=2) * torch.linalg.vector_norm(y, dim=2)
            result.copy_(1 - (x @ y.mT)[:, 0] / lengths.clamp_min(_TINY))
    return distances


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
