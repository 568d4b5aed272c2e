"""Fixed embeddings to measure at: synthetic data sets with hard negatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clustered_embeddings", "clustered_pairs"]


def clustered_embeddings(
    num_samples: int = 500,
    dim: int = 32,
    *,
    clusters: int = 15,
    spread: float = 1.0,
    view_spread: float = 0.5,
    views: int = 2,
    seed: int = 0,
) -> Tensor:
    """Unit vectors of each sample's views around random centres: a data set with hard negatives, (num_samples, views,
    dim).

    ``spread`` is the length of a sample's random offset from its unit centre, ``view_spread`` that of a
    view's offset from its sample.
    """
    offset = _offsets(dim, seed)
    samples = _samples(num_samples, clusters, spread, offset)
    embeddings: Tensor = F.normalize(samples[:, None] + view_spread * offset(num_samples, views), dim=2)
    return embeddings


def clustered_pairs(
    num_samples: int = 500,
    dim: int = 32,
    *,
    clusters: int = 15,
    spread: float = 1.0,
    query_spread: float = 0.7,
    key_spread: float = 0.3,
    gap: float = 0.5,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Unit vectors of queries and of their keys, (num_samples, dim) each, around random centres.

    A key is near its sample and a query farther from it: ``key_spread`` and ``query_spread`` are the lengths of their
    random offsets. All queries are shifted by one more vector, of length ``gap``, as two encoders' embeddings are.
    """
    offset = _offsets(dim, seed)
    samples = _samples(num_samples, clusters, spread, offset)
    keys = F.normalize(samples + key_spread * offset(num_samples), dim=1)
    queries = F.normalize(samples + query_spread * offset(num_samples) + gap * F.normalize(offset(1), dim=1), dim=1)
    return queries, keys


def _offsets(dim: int, seed: int) -> Callable[..., Tensor]:
    """Return a function that draws vectors of about unit length, in a given shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dim, generator=generator) / math.sqrt(dim)


def _samples(num_samples: int, clusters: int, spread: float, offset: Callable[..., Tensor]) -> Tensor:
    centres = F.normalize(offset(clusters), dim=1)
    return F.normalize(centres[torch.arange(num_samples) % clusters] + spread * offset(num_samples), dim=1)
