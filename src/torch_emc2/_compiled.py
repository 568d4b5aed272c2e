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
    log_scores: Any, carried_score: Any, noise: Any, counted: Any, order: Any,
    steps: Any, carried_steps: Any, state: Any, score: Any, accepted: Any,
) -> None:  # fmt: skip
    walks, total, num_proposals = noise.shape
    num_chains = total // log_scores.shape[1]
    accepted_at = np.empty((4, num_proposals + 1), np.int64)
    clock = np.empty(num_proposals + 1, np.int64)  # counted steps before each step
    for walk in range(walks):
        for first in range(0, total, 4):
            a, b, c, d = first, min(first + 1, total - 1), min(first + 2, total - 1), min(first + 3, total - 1)
            row_a, row_b, row_c, row_d = a // num_chains, b // num_chains, c // num_chains, d // num_chains
            at_a = log_scores[walk, row_a, state[a]] if state[a] >= 0 else carried_score[walk, a]
            at_b = log_scores[walk, row_b, state[b]] if state[b] >= 0 else carried_score[walk, b]
            at_c = log_scores[walk, row_c, state[c]] if state[c] >= 0 else carried_score[walk, c]
            at_d = log_scores[walk, row_d, state[d]] if state[d] >= 0 else carried_score[walk, d]
            num_a, num_b, num_c, num_d = 0, 0, 0, 0
            for k in range(num_proposals):
                proposal = order[k]
                accepted_at[0, num_a] = k
                accept = log_scores[walk, row_a, proposal] + noise[walk, a, k] > at_a
                num_a += accept
                at_a = log_scores[walk, row_a, proposal] if accept else at_a
                accepted_at[1, num_b] = k
                accept = log_scores[walk, row_b, proposal] + noise[walk, b, k] > at_b
                num_b += accept
                at_b = log_scores[walk, row_b, proposal] if accept else at_b
                accepted_at[2, num_c] = k
                accept = log_scores[walk, row_c, proposal] + noise[walk, c, k] > at_c
                num_c += accept
                at_c = log_scores[walk, row_c, proposal] if accept else at_c
                accepted_at[3, num_d] = k
                accept = log_scores[walk, row_d, proposal] + noise[walk, d, k] > at_d
                num_d += accept
                at_d = log_scores[walk, row_d, proposal] if accept else at_d
            for lane in range(min(4, total - first)):
                chain = first + lane
                row = chain // num_chains
                num = (num_a, num_b, num_c, num_d)[lane]
                if chain % num_chains == 0:  # the first chain of its row; the clock is that of all
                    before = 0
                    for k in range(num_proposals):
                        clock[k] = before
                        before += counted[walk, row, k]
                    clock[num_proposals] = before
                accepted_at[lane, num] = num_proposals
                if state[chain] < 0:
                    carried_steps[walk, chain] = clock[accepted_at[lane, 0]]
                else:
                    steps[walk, row, state[chain]] += clock[accepted_at[lane, 0]]
                for i in range(num):
                    steps[walk, row, order[accepted_at[lane, i]]] += (
                        clock[accepted_at[lane, i + 1]] - clock[accepted_at[lane, i]]
                    )
                if num:
                    state[chain] = order[accepted_at[lane, num - 1]]
                score[chain] = (at_a, at_b, at_c, at_d)[lane]
                accepted[0] += num


def walk(
    log_scores: Tensor, carried_score: Tensor, noise: Tensor, counted: Tensor, order: Tensor
) -> tuple[Tensor, ...]:
    """The fields of `torch_emc2.metropolis.Walk`, whose arguments these are, on the CPU."""
    walks, rows, num_chains, _ = noise.shape
    steps, carried_steps = torch.zeros_like(log_scores), torch.zeros_like(carried_score)
    state = torch.full((rows, num_chains), -1)
    score, accepted = carried_score.new_empty(rows, num_chains), torch.zeros(1, dtype=torch.int64)
    _walk(
        log_scores.contiguous().numpy(),
        carried_score.reshape(walks, -1).numpy(),
        noise.reshape(walks, -1, noise.shape[3]).numpy(),
        counted.contiguous().numpy(),
        order.numpy(),
        steps.numpy(),
        carried_steps.view(walks, -1).numpy(),
        state.view(-1).numpy(),
        score.view(-1).numpy(),
        accepted.numpy(),
    )
    return steps, carried_steps, state, score, accepted[0]
