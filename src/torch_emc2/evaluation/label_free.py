"""Numbers of features that need no labels."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torch_emc2.evaluation._checks import check_matrix

__all__ = ["alignment", "effective_rank", "label_free_numbers", "retrieval", "uniformity"]


def label_free_numbers(x: Tensor, views: Tensor) -> dict[str, float]:
    """Return all numbers of features (n, d) of images and (n, 2, d) of two views of each, n of at least 2."""
    return {
        "alignment": alignment(views),
        "uniformity": uniformity(x),
        "effective_rank": effective_rank(x),
        "retrieval": retrieval(views),
    }


def alignment(views: Tensor) -> float:
    """`E |f(x) - f(x')|²` of two views x, x' of an image, f of unit length: 0 to 4, less is better.

    Wang and Isola, arXiv 2005.10242, with α = 2.

    Args:
        views: (n, 2, d), the features of two views of each image.
    """
    first, second = _unit(views, rows=1).unbind(1)
    return float((first - second).square().sum(dim=1).mean())


def uniformity(x: Tensor) -> float:
    """`log E exp(-2 |f(x) - f(y)|²)` of two different images x, y, f of unit length: -8 to 0, less is better.

    Wang and Isola, arXiv 2005.10242, with t = 2. It is 0 where all features are equal.

    Args:
        x: (n, d), n of at least 2; memory is some 20 n² bytes.
    """
    check_matrix("held-out", x, rows=2)
    x = normalize(x.double(), dim=1)
    square_norms = x.square().sum(dim=1)  # 1, but for a zero vector
    square_distances = square_norms[:, None] + square_norms - 2 * x @ x.T
    pairs = torch.ones_like(square_distances, dtype=torch.bool).triu(1)
    return float((-2 * square_distances[pairs]).exp().mean().log())


def effective_rank(x: Tensor) -> float:
    """`exp(H(p))` with the entropy H of the singular values' shares `p_i = σ_i / Σ σ`: 1 to min(n, d).

    How many directions the features fill: Roy and Vetterli, EUSIPCO 2007. As there, features are not centred.

    Args:
        x: (n, d).
    """
    check_matrix("held-out", x)
    singular = torch.linalg.svdvals(x.double())
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum().exp())


def retrieval(views: Tensor, *, chunk_size: int = 512) -> float:
    """Share of views whose nearest, by the cosine, of the other 2n - 1 is the other view of the same image.

    Where a third view is as near, it is not retrieved. Chance is 1 / (2n - 1).

    Args:
        views: (n, 2, d), the features of two views of each image, n of at least 2.
        chunk_size: views compared at once.
    """
    x = _unit(views, rows=2).flatten(0, 1)
    hits = 0
    for rows in torch.split(torch.arange(len(x)), chunk_size):
        cosines, own = x[rows] @ x.T, torch.arange(len(rows))
        partner = cosines[own, rows ^ 1]
        cosines[own, rows] = cosines[own, rows ^ 1] = -torch.inf
        hits += int((partner > cosines.amax(dim=1)).sum())
    return hits / len(x)


def _unit(views: Tensor, rows: int) -> Tensor:
    if views.ndim != 3 or views.shape[1] != 2:
        raise ValueError(f"features of views have shape {tuple(views.shape)}; give two views an image, (n, 2, d)")
    check_matrix("views'", views.flatten(1), rows)
    return normalize(views.double(), dim=2)
