"""Fixed embeddings to measure at: a data set with hard negatives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clustered_embeddings"]


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

    ``spread`` is the length of a sample's random offset from its unit centre, ``view_spread`` of a view's from its
    sample.
    """
    generator = torch.Generator().manual_seed(seed)

    def offset(*shape: int) -> Tensor:
        return torch.randn(*shape, dim, generator=generator) / math.sqrt(dim)

    centres = F.normalize(offset(clusters), dim=1)
    samples = F.normalize(centres[torch.arange(num_samples) % clusters] + spread * offset(num_samples), dim=1)
    embeddings: Tensor = F.normalize(samples[:, None] + view_spread * offset(num_samples, views), dim=2)
    return embeddings
