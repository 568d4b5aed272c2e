"""Iterated sampling importance resampling: a chain chooses among the batch and its carried state, with no loop.

From the state x, draw a random set of candidates that holds x, and choose the next state in it with probability
proportional to its target density. The kernel leaves the target invariant also where candidates are drawn without
replacement: given the set, the choice does not depend on which member x was (Andrieu, Doucet and Holenstein 2010). The
probabilities themselves estimate the target's expectations, with less variance than the one state chosen (BR-SNIS,
Cardoso et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.kernels.base import Draws, Kernel, Move, Visit
from torch_emc2.kernels.counted import CountedDraws

__all__ = ["Isir", "Resampling", "resample"]


@dataclass(frozen=True)
class Isir(Kernel):
    """Each chain chooses among a set and its carried state by their softmax, which also gives the weights.

    If the carried state is a proposal of one set, only that set is used: the other sets, which lack it, are not uniform
    draws of sets that hold it.
    """

    def move(self, visit: Visit, draws: Draws) -> Move:
        """Choose once in each set; see `Kernel.move`."""
        if isinstance(draws, CountedDraws) and draws.kernels.resamples(visit):
            return draws.kernels.isir(visit, draws.counters())  # type: ignore[no-any-return]
        num_chains = visit.carried_score.shape[1]
        inside = visit.inside
        candidates = inside | ~inside.any(1, keepdim=True)  # (rows, sets, chains): all sets, or the ones that hold it
        count = candidates.sum(1, keepdim=True)
        number = visit.keep_in[:, None] % count  # of a candidate set: all are, or so few that any will do
        kept_in = (candidates & (candidates.cumsum(1) == number + 1)).long().argmax(1)
        # A sample's chains draw from different parts of (0, 1], in random order: each uniform, together well spread.
        noise = draws.exponential(2, num_chains)
        uniform = (noise[:, 0].neg().exp_() + noise[:, 1].argsort(-1).argsort(-1)) / num_chains
        done = resample(
            visit.log_scores,
            torch.where(inside, -torch.inf, visit.carried_score[:, None]),
            candidates.to(visit.log_scores.dtype) / count,
            kept_in,
            uniform,
        )
        column = visit.sets[kept_in, done.state]  # arbitrary for -1
        state = torch.where(done.state < 0, done.state, column)
        return Move(visit.to_columns(done.weights), done.carried_weights, state, 1 - done.carried_weights.mean(1))


class Resampling(NamedTuple):
    """Probabilities and choices.

    Attributes:
        weights: (rows, sets, n) probability of each proposal, mean over the row's chains.
        carried_weights: (rows, chains) probability of the carried state.
        state: (rows, chains) int64 proposal chosen in the set drawn, -1 for the carried state.
    """

    weights: Tensor
    carried_weights: Tensor
    state: Tensor


def resample(log_scores: Tensor, carried_score: Tensor, share: Tensor, in_set: Tensor, uniform: Tensor) -> Resampling:
    """Choose the next state of each of a row's chains, in one of the row's sets: a proposal or the carried state.

    Args:
        log_scores: (rows, sets, n) log scores of the proposals; -inf for those that may not be chosen, but not all of a
            set.
        carried_score: (rows, sets, chains) log scores of the carried states; -inf where there is none, or where the
            carried state is among the set's proposals, so that it is not counted twice.
        share: (rows, sets, chains) probability of each set for the chain.
        in_set: (rows, chains) int64, the set drawn.
        uniform: (rows, chains) independent draws in (0, 1].
    """
    num_proposals = log_scores.shape[2]
    peak = log_scores.amax(2, keepdim=True)
    scores = (log_scores - peak).exp()
    cumulative = scores.cumsum(2)
    mass = cumulative[..., -1:]
    carried_weights = torch.sigmoid(carried_score - (mass.log() + peak))
    rest = (1 - carried_weights) / mass  # probability of a unit of score, per chain
    weights = scores * (share * rest).mean(2, keepdim=True)
    beyond = ((uniform[:, None] - carried_weights) / rest).clamp(max=mass)  # place on the scores; stay if not positive
    chosen = torch.searchsorted(cumulative, beyond.contiguous()).clamp(max=num_proposals - 1)
    state = torch.where(beyond > 0, chosen, -1)
    return Resampling(weights, (share * carried_weights).sum(1), state.gather(1, in_set[:, None])[:, 0])
