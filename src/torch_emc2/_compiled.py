"""The loop of `metropolis.metropolis_hastings`, compiled for the CPU by numba: one pass over memory instead of a scan's many."""

from __future__ import annotations

from typing import Any

import numba
import torch
from torch import Tensor


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _loop(log_scores: Any, entry_score: Any, noise: Any, valid: Any, state: Any, score: Any) -> None:
    rows, num_proposals = log_scores.shape
    for row in range(rows):
        current, at = entry_score[row], -1
        for k in range(num_proposals):
            if valid[row, k] and log_scores[row, k] + noise[row, k] > current:
                current, at = log_scores[row, k], k
            state[row, k] = at
        score[row] = current


def metropolis_hastings(
    log_scores: Tensor, entry_score: Tensor, noise: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(state, score)`` of every chain; arguments as in `torch_emc2.metropolis.metropolis_hastings`, on the CPU."""
    if valid is None:
        valid = torch.ones(1, 1, dtype=torch.bool).expand(log_scores.shape)
    state, score = torch.empty(log_scores.shape, dtype=torch.int64), torch.empty_like(entry_score)
    arrays = (tensor.detach().numpy() for tensor in (log_scores, entry_score, noise, valid, state, score))
    _loop(*arrays)
    return state, score
