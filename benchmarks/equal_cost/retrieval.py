"""How well queries find their keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["global_loss", "metrics", "ranks"]

Places = tuple[Tensor, Tensor]
"""Rows and columns of positives; every row has one."""


def ranks(queries: Tensor, keys: Tensor, positives: Places, *, chunk_size: int = 256) -> Tensor:
    """Return the place, from 1, of each query's best positive among it and all negatives; a tie is lost.

    Args:
        queries: (q, d) unit vectors.
        keys: (k, d) unit vectors.
        positives: of the queries.
        chunk_size: queries at a time.
    """
    found = []
    for start in range(0, len(queries), chunk_size):
        scores = queries[start : start + chunk_size] @ keys.T
        rows, columns = _of(positives, start, len(scores))
        best = scores.new_full(scores.shape[:1], -math.inf).scatter_reduce(0, rows, scores[rows, columns], "amax")
        scores[rows, columns] = -math.inf
        found.append(1 + (scores >= best[:, None]).sum(1))
    return torch.cat(found)


def metrics(found: Tensor) -> dict[str, float]:
    """Percent of queries whose rank is 1, or up to 10, and the mean reciprocal rank in percent."""
    at = {"R@1": found <= 1, "R@10": found <= 10, "MRR": 1 / found}
    return {name: 100 * value.float().mean().item() for name, value in at.items()}


def global_loss(
    queries: Tensor, keys: Tensor, positives: Places, temperature: float, *, chunk_size: int = 256
) -> float:
    """Return the exact global loss of these queries per negative, mean of -β s_pos + log mean_j exp(β s_j)."""
    total = 0.0
    for start in range(0, len(queries), chunk_size):
        logits = queries[start : start + chunk_size] @ keys.T / temperature
        rows, columns = _of(positives, start, len(logits))
        count = rows.bincount(minlength=len(logits))
        positive = logits.new_zeros(len(logits)).index_add_(0, rows, logits[rows, columns]) / count
        logits[rows, columns] = -math.inf
        total += (logits.logsumexp(1) - (len(keys) - count).log() - positive).sum().item()
    return total / len(queries)


def _of(positives: Places, start: int, count: int) -> Places:
    rows, columns = positives
    here = (rows >= start) & (rows < start + count)
    return rows[here] - start, columns[here]
