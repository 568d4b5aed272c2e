"""The loop of `metropolis.walk`, compiled for the CPU by numba: one pass over memory instead of a scan's many.

About every third proposal is accepted and none predictably, so a branch a step would cost more than all else. Steps are therefore
branch-free (each notes its number where the next acceptance goes, and the place moves on only if it was one), and four chains
advance together, so that none waits for its own last comparison.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _walk(
    log_scores: Any, entry_score: Any, noise: Any, counted: Any,
    steps: Any, carried_steps: Any, state: Any, score: Any, accepted: Any,
) -> None:  # fmt: skip
    total, num_proposals = noise.shape
    num_chains = total // len(log_scores)
    accepted_at = np.empty((4, num_proposals + 1), np.int64)
    clock = np.empty(num_proposals + 1, np.int64)  # counted steps before each step
    for first in range(0, total, 4):
        a, b, c, d = first, min(first + 1, total - 1), min(first + 2, total - 1), min(first + 3, total - 1)
        row_a, row_b, row_c, row_d = a // num_chains, b // num_chains, c // num_chains, d // num_chains
        at_a, at_b, at_c, at_d = entry_score[a], entry_score[b], entry_score[c], entry_score[d]
        num_a, num_b, num_c, num_d = 0, 0, 0, 0
        for k in range(num_proposals):
            accepted_at[0, num_a] = k
            accept = log_scores[row_a, k] + noise[a, k] > at_a
            num_a += accept
            at_a = log_scores[row_a, k] if accept else at_a
            accepted_at[1, num_b] = k
            accept = log_scores[row_b, k] + noise[b, k] > at_b
            num_b += accept
            at_b = log_scores[row_b, k] if accept else at_b
            accepted_at[2, num_c] = k
            accept = log_scores[row_c, k] + noise[c, k] > at_c
            num_c += accept
            at_c = log_scores[row_c, k] if accept else at_c
            accepted_at[3, num_d] = k
            accept = log_scores[row_d, k] + noise[d, k] > at_d
            num_d += accept
            at_d = log_scores[row_d, k] if accept else at_d
        for lane in range(min(4, total - first)):
            chain = first + lane
            row = chain // num_chains
            num = (num_a, num_b, num_c, num_d)[lane]
            if chain % num_chains == 0 or lane == 0:  # the first chain of a row here
                before = 0
                for k in range(num_proposals):
                    clock[k] = before
                    before += counted[row, k]
                clock[num_proposals] = before
            accepted_at[lane, num] = num_proposals
            carried_steps[chain] = clock[accepted_at[lane, 0]]
            for i in range(num):
                steps[row, accepted_at[lane, i]] += clock[accepted_at[lane, i + 1]] - clock[accepted_at[lane, i]]
            state[chain] = accepted_at[lane, num - 1] if num else -1
            score[chain] = (at_a, at_b, at_c, at_d)[lane]
            accepted[chain] = num


def walk(log_scores: Tensor, entry_score: Tensor, noise: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
    """The fields of `torch_emc2.metropolis.Walk`, whose arguments these are, on the CPU."""
    results = (
        torch.zeros_like(log_scores),
        torch.empty_like(entry_score),
        torch.empty(entry_score.shape, dtype=torch.int64),
        torch.empty_like(entry_score),
        torch.empty(entry_score.shape, dtype=torch.int64),
    )
    steps, *per_chain = results
    _walk(
        log_scores.contiguous().numpy(),
        entry_score.flatten().numpy(),
        noise.flatten(0, 1).contiguous().numpy(),
        counted.contiguous().numpy(),
        steps.numpy(),
        *(tensor.view(-1).numpy() for tensor in per_chain),
    )
    return results
