"""Iterated sampling importance resampling: a chain that chooses among the batch and what it carries, with no loop.

From the state x, draw a random set of candidates that holds x, and choose the next state in it with probability
proportional to its target density. The kernel leaves the target invariant also where candidates are drawn without
replacement: given the set, the choice forgets which member x was (Andrieu, Doucet and Holenstein 2010). The
probabilities themselves estimate the target's expectations, with less variance than the one state chosen (BR-SNIS,
Cardoso et al. 2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Resampling", "resample"]


class Resampling(NamedTuple):
    """Probabilities and choices.

    Attributes:
        weights: (rows, N) probability of each proposal, mean over the row's chains.
        carried_weights: (rows, chains) probability of the carried state.
        state: (rows, chains) int64 proposal chosen, -1 for the carried state.
    """

    weights: Tensor
    carried_weights: Tensor
    state: Tensor


def resample(log_scores: Tensor, carried_score: Tensor, uniform: Tensor) -> Resampling:
    """Choose the next state of several chains a row among the row's proposals and the chain's carried state.

    Args:
        log_scores: (rows, N) log scores of the proposals; -inf for those that may not be chosen, but not all of a row.
        carried_score: (rows, chains) log scores of the carried states; -inf where there is none, or where it is among
            the proposals, which must not count it twice.
        uniform: (rows, chains) independent draws in (0, 1].
    """
    peak = log_scores.amax(1, keepdim=True)
    scores = (log_scores - peak).exp()
    cumulative = scores.cumsum(1)
    mass = cumulative[:, -1:]
    log_mass = mass.log() + peak
    carried_weights = torch.sigmoid(carried_score - log_mass)
    rest = (1 - carried_weights) / mass  # of each chain, for a unit of score
    weights = scores * rest.mean(1, keepdim=True)
    beyond = ((uniform - carried_weights) / rest).clamp(max=mass)  # place on the cumulative scores; not positive: stay
    chosen = torch.searchsorted(cumulative, beyond.contiguous()).clamp(max=log_scores.shape[1] - 1)
    return Resampling(weights, carried_weights, torch.where(beyond > 0, chosen, -1))
