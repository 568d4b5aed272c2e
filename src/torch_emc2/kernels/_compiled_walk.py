"""The loop of `metropolis.walk`, compiled for the CPU by numba: one pass over memory instead of a scan's many.

About every third proposal is accepted and none predictably, so a branch a step would cost more than all else. Steps are
therefore branch-free (each notes its number where the next acceptance goes, and the place moves on only if it was one),
and four chains advance together, so that none waits for its own last comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor


def _compile(function: Callable[..., None]) -> Any:
    """Compile a function, once and for all where numba finds a folder that it may write."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        return numba.njit(nogil=True, error_model="numpy")(function)


@_compile
def _walk(
    log_scores: Any, carried_score: Any, noise: Any, burnt: Any,
    steps: Any, carried_steps: Any, state: Any, accepted: Any,
) -> None:  # fmt: skip
    total, num_proposals = noise.shape
    num_chains = total // len(log_scores)
    accepted_at = np.empty((4, num_proposals + 1), np.int64)
    clock = np.empty(num_proposals + 1, np.int64)  # counted steps before each step
    for first in range(0, total, 4):
        a, b, c, d = first, min(first + 1, total - 1), min(first + 2, total - 1), min(first + 3, total - 1)
        row_a, row_b, row_c, row_d = a // num_chains, b // num_chains, c // num_chains, d // num_chains
        at_a, at_b, at_c, at_d = carried_score[a], carried_score[b], carried_score[c], carried_score[d]
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
            if chain % num_chains == 0:  # the first chain of its row; the clock is that of all
                step = -burnt[row]
                for k in range(num_proposals):
                    clock[k] = max(step, 0)
                    step += log_scores[row, k] > -np.inf
                clock[num_proposals] = max(step, 0)
            accepted_at[lane, num] = num_proposals
            carried_steps[chain] = clock[accepted_at[lane, 0]]
            for i in range(num):
                spent = clock[accepted_at[lane, i + 1]] - clock[accepted_at[lane, i]]
                steps[row, accepted_at[lane, i]] += spent
            state[chain] = accepted_at[lane, num - 1] if num else -1
            accepted[0] += num


def walk(log_scores: Tensor, carried_score: Tensor, noise: Tensor, burnt: Tensor) -> tuple[Tensor, ...]:
    """The fields of `torch_emc2.kernels.metropolis.Walk`, whose arguments these are, on the CPU."""
    log_scores, carried_score = log_scores.contiguous(), carried_score.contiguous()
    steps, carried_steps = torch.zeros_like(log_scores), torch.zeros_like(carried_score)
    state, accepted = torch.empty(carried_score.shape, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    _walk(
        log_scores.numpy(),
        carried_score.view(-1).numpy(),
        noise.flatten(0, 1).numpy(),
        burnt.numpy(),
        steps.numpy(),
        carried_steps.view(-1).numpy(),
        state.view(-1).numpy(),
        accepted.numpy(),
    )
    return steps, carried_steps, state, accepted[0]
