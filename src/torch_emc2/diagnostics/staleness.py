"""Staleness: how far stored scores of carried negatives are from today's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Staleness", "score_staleness"]


@dataclass(frozen=True)
class Staleness:
    """Stored log scores of carried negatives against today's.

    Attributes:
        chains: number compared.
        median: median absolute difference, over chains and the pairs of views that a chain may meet.
        p90: its 90th percentile.
        correlation: of stored and today's scores.
        views_median: the same median between today's scores of disjoint views: the part that is due to the random
            views and not to age.
    """

    chains: int
    median: float
    p90: float
    correlation: float
    views_median: float


def score_staleness(stored: Tensor, anchors: Tensor, carried: Tensor, temperature: float) -> Staleness:
    """Compare stored log scores with those of today's embeddings.

    Args:
        stored: (k,) log scores of the similarities that the chains keep; at least 2.
        anchors: (k, 2, d) today's embeddings of two views of each chain's sample.
        carried: (k, 2, d) the same for the sample that the chain carries.
        temperature: 1 / β.
    """
    today = F.normalize(anchors, dim=2) @ F.normalize(carried, dim=2).mT / temperature  # (k, 2, 2) pairs of views
    stored = stored.to(today)[:, None, None].expand_as(today)
    difference = (stored - today).abs().flatten()
    disjoint = (today - today.flip(1, 2)).abs()
    return Staleness(
        chains=len(today),
        median=difference.quantile(0.5).item(),
        p90=difference.quantile(0.9).item(),
        correlation=torch.corrcoef(torch.stack([stored.flatten(), today.flatten()]))[0, 1].item(),
        views_median=disjoint.flatten().quantile(0.5).item(),
    )
