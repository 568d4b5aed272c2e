"""Metropolis–Hastings with uniform proposals, all steps of all chains at once.

A chain sits at a state of log score ``c``. A proposal of log score ``x`` is accepted with probability ``min(1, e^(x - c))``,
that is, iff ``x + e > c`` with ``e ~ Exp(1)``. As a function of the current score one step is therefore

    f(c) = x  if c < t  else c,        t = x + e >= x,

and such maps compose into their own kind: first ``(t1, x1)``, then ``(t2, x2)`` is ``(max(t1, t2), x2 if x1 < t2 else x1)``.
Composition is associative, so the states after every step come from a prefix scan in ``ceil(log2 N)`` rounds instead of
``N`` steps, with the same comparisons of the same floats as the loop: the states are equal, not just equally distributed.
Everything stays in the log domain, where no temperature overflows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

try:
    from torch_emc2 import _compiled
except ImportError:  # numba is optional: without it the CPU takes the scan as well
    _compiled = None  # type: ignore[assignment]

__all__ = ["MHResult", "Walk", "fill_exponential", "metropolis_hastings", "walk"]


class MHResult(NamedTuple):
    """The path of every chain: ``state`` (rows, N) int64 after each step, ``score`` (rows,) the log score at the end."""

    state: Tensor
    score: Tensor


class Walk(NamedTuple):
    """A walk in summary.

    Attributes:
        steps: (rows, N) counted steps spent at each proposal, summed over a row's chains.
        carried_steps: (rows, chains) counted steps spent at the carried state.
        state: (rows, chains) int64 proposal each chain ends at, -1 for the carried state.
        score: (rows, chains) log score each chain ends with.
        accepted: (rows, chains) number of proposals accepted.
    """

    steps: Tensor
    carried_steps: Tensor
    state: Tensor
    score: Tensor
    accepted: Tensor


def metropolis_hastings(
    log_scores: Tensor, entry_score: Tensor, noise: Tensor, valid: Tensor | None = None
) -> MHResult:
    """Run one Metropolis–Hastings chain a row over its proposals, in their order.

    Args:
        log_scores: (rows, N) log scores of the proposals, float32 or float64. Unnormalised; -inf is never accepted.
        entry_score: (rows,) log score of the state each chain comes in with; -inf for a chain that has none, whose first
            valid proposal is accepted.
        noise: (rows, N) independent Exp(1) draws, finite.
        valid: (rows, N); a step whose proposal is not valid leaves its chain where it is. Default: all are.

    Returns:
        ``state`` (rows, N): the column each chain sits at after each step, -1 while it is still at the carried state;
        ``score`` (rows,): the log score it ends with.

    Example::

        >>> x, noise = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[0.1, 0.1, 0.1]])
        >>> metropolis_hastings(x, torch.tensor([1.0]), noise).state
        tensor([[-1,  1,  1]])
    """
    _validate(log_scores, entry_score, noise, valid)
    threshold = log_scores + noise
    if valid is not None:
        threshold.masked_fill_(~valid, -torch.inf)
    score = log_scores.masked_fill(threshold == -torch.inf, -torch.inf)  # keeps score <= threshold, which the family needs
    num_proposals = log_scores.shape[1]
    state = torch.arange(num_proposals, device=log_scores.device).repeat(log_scores.shape[0], 1)
    stride = 1
    while stride < num_proposals:  # after this round, entry k composes the 2 * stride maps that end at k
        later = score[:, :-stride] < threshold[:, stride:]
        state[:, stride:] = torch.where(later, state[:, stride:], state[:, :-stride])
        score[:, stride:] = torch.where(later, score[:, stride:], score[:, :-stride])
        threshold[:, stride:] = torch.maximum(threshold[:, stride:], threshold[:, :-stride])
        stride *= 2
    moved = entry_score[:, None] < threshold
    return MHResult(state.masked_fill_(~moved, -1), torch.where(moved[:, -1], score[:, -1], entry_score))


def walk(log_scores: Tensor, entry_score: Tensor, noise: Tensor, counted: Tensor) -> Walk:
    """Run several chains a row over the same proposals and count where they spend their steps.

    The chains are those of `metropolis_hastings`. On the CPU, where numba is installed, one compiled pass over memory takes the
    place of the scan's many; states and counts are the same.

    Args:
        log_scores: (rows, N) log scores of the proposals, -inf for those that may not be accepted.
        entry_score: (rows, chains) log score of the state each chain comes in with.
        noise: (rows, chains, N) independent Exp(1) draws.
        counted: (rows, N) bool, the steps that count.
    """
    if _compiled is not None and log_scores.device.type == "cpu":
        return Walk(*_compiled.walk(log_scores, entry_score, noise, counted))
    return _walk_by_scan(log_scores, entry_score, noise, counted)


def _walk_by_scan(log_scores: Tensor, entry_score: Tensor, noise: Tensor, counted: Tensor) -> Walk:
    num_chains = entry_score.shape[1]
    log_scores, counted = (tensor.repeat_interleave(num_chains, 0) for tensor in (log_scores, counted))
    state, score = metropolis_hastings(log_scores, entry_score.flatten(), noise.flatten(0, 1))
    steps = noise.new_zeros(len(state), state.shape[1] + 1).scatter_add_(1, state + 1, counted.to(noise.dtype))
    accepted = (state == torch.arange(state.shape[1], device=state.device)).sum(1)
    return Walk(
        steps[:, 1:].unflatten(0, (-1, num_chains)).sum(1),
        *(tensor.view(-1, num_chains) for tensor in (steps[:, 0], state[:, -1], score, accepted)),
    )


def fill_exponential(noise: Tensor, seed: int) -> None:
    """Fill a tensor in place with finite Exp(1) draws, a function of ``seed`` on each kind of device."""
    noise.uniform_(generator=torch.Generator(noise.device).manual_seed(seed))
    noise.neg_().add_(1).log_().neg_()  # uniform_ draws from [0, 1): 1 - u is never 0, whose logarithm is infinite


def _validate(log_scores: Tensor, entry_score: Tensor, noise: Tensor, valid: Tensor | None) -> None:
    if log_scores.ndim != 2 or log_scores.shape[1] == 0:
        raise ValueError(f"log_scores must be (rows, N) with N >= 1, got {tuple(log_scores.shape)}")
    if entry_score.shape != log_scores.shape[:1]:
        raise ValueError(f"entry_score must be ({log_scores.shape[0]},) as log_scores has rows, got {tuple(entry_score.shape)}")
    for name, tensor in (("noise", noise), ("valid", valid)):
        if tensor is not None and tensor.shape != log_scores.shape:
            raise ValueError(f"{name} must be {tuple(log_scores.shape)} like log_scores, got {tuple(tensor.shape)}")
    if not log_scores.dtype == entry_score.dtype == noise.dtype or log_scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            "log_scores, entry_score and noise must share one dtype, float32 or float64, "
            f"got {log_scores.dtype}, {entry_score.dtype}, {noise.dtype}"
        )
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
