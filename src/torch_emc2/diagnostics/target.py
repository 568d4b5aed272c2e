"""The target: what each row's chain has to draw from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Target", "target_statistics"]


_SIMILARITIES = 4096**2  # in memory at a time


@dataclass(frozen=True)
class Target:
    """The softmax over all N negatives that each row's chain has to draw from, as statistics over rows.

    Attributes:
        negatives: N.
        perplexity: exp(entropy), the effective number of negatives; mean.
        effective: 1 / Σp², another effective number, in which rare negatives count less; mean.
        peak: N · max p; mean.
        peak_max: the same; largest.
        steps: number of steps after which a chain with uniform proposals is within total variation ½ of the target,
            whatever its start, by λ = 1 - 1 / (N max p) (docs/theory.md); mean.
        steps_max: the same; largest.
        visits: ``steps`` in visits of b - 1 steps.
        visits_max: ``steps_max`` in visits of b - 1 steps.
    """

    negatives: int
    perplexity: float
    effective: float
    peak: float
    peak_max: float
    steps: float
    steps_max: float
    visits: float
    visits_max: float


def target_statistics(z: Tensor, temperature: float, batch_size: int) -> Target:
    """Describe the softmax over all negatives of each row of ``z`` (m, views, d), chunk by chunk."""
    m, views, _ = z.shape
    flat = F.normalize(z.detach().to(torch.promote_types(z.dtype, torch.float32)), dim=2).flatten(0, 1)
    sample = torch.arange(m, device=z.device).repeat_interleave(views)
    size = max(1, _SIMILARITIES // len(flat))
    entropies, concentrations, peaks = [], [], []
    for rows in torch.split(torch.arange(len(flat), device=z.device), size):
        own = sample[rows, None] == sample
        log_p = (flat[rows] @ flat.T).div_(temperature).masked_fill_(own, -torch.inf).log_softmax(1)
        p = log_p.exp()
        entropies.append(-(p * log_p.masked_fill(own, 0.0)).sum(1))
        concentrations.append(p.square().sum(1))
        peaks.append(p.amax(1))
    negatives = (m - 1) * views
    peak = (torch.cat(peaks) * negatives).clamp(min=1.0)  # rounding can leave it below
    steps = math.log(2) / -torch.log1p(-1 / peak)
    visit = batch_size - 1
    return Target(
        negatives=negatives,
        perplexity=torch.cat(entropies).exp().mean().item(),
        effective=torch.cat(concentrations).reciprocal().mean().item(),
        peak=peak.mean().item(),
        peak_max=peak.max().item(),
        steps=steps.mean().item(),
        steps_max=steps.max().item(),
        visits=steps.mean().item() / visit,
        visits_max=steps.max().item() / visit,
    )
