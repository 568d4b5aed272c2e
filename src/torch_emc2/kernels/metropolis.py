"""Metropolis–Hastings with uniform proposals, all steps of all chains at once.

A chain sits at a state of log score ``c``. A proposal of log score ``x`` is accepted with probability ``min(1, e^(x -
c))``, that is, iff ``x + e > c`` with ``e ~ Exp(1)``. As a function of the current score one step is therefore

    f(c) = x  if c < t  else c,        t = x + e >= x,

and the composition of two such maps is another one: first ``(t1, x1)``, then ``(t2, x2)`` is ``(max(t1, t2), x2 if x1 <
t2 else x1)``. Composition is associative, so the states after every step come from a prefix scan in ``ceil(log2 N)``
rounds instead of ``N`` steps, with the same comparisons of the same floats as the loop: the states are equal, not just
equally distributed. Everything stays in the log domain, which does not overflow at any temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.kernels.base import Draws, Kernel, Move, Visit
from torch_emc2.kernels.counted import CountedDraws

__all__ = ["MHResult", "Metropolis", "Walk", "metropolis_hastings", "walk"]


@dataclass(frozen=True)
class Metropolis(Kernel):
    """The paper's kernel: each chain walks over each set, from its carried state, one proposal after the other.

    The weight of a proposal is the share of the chain's counted steps that it spends there.

    Args:
        burn_in: share of a walk's steps, at its start, that are not counted, in [0, 1).
    """

    burn_in: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.burn_in < 1:
            raise ValueError(f"burn_in must be in [0, 1), the share of steps left out; got {self.burn_in}")

    def move(self, visit: Visit, draws: Draws) -> Move:
        """Walk over all sets; see `Kernel.move`."""
        walk_over: Callable[[Visit], Move]
        if isinstance(draws, CountedDraws):
            walk_over = partial(draws.kernels.metropolis, counters=draws.counters(), burn_in=self.burn_in)
        else:
            noise = draws.exponential(len(visit.sets), visit.carried_score.shape[1], visit.sets.shape[1])
            walk_over = partial(_walk_over_sets, noise=noise, burn_in=self.burn_in)
        return walk_over(visit) if visit.positive_place is None else _with_positive(visit, walk_over, draws)


def _walk_over_sets(visit: Visit, noise: Tensor, burn_in: float) -> Move:
    """Move by scans, with ``noise`` (rows, sets, chains, n)."""
    rows, num_sets, _ = visit.log_scores.shape
    num_chains = visit.carried_score.shape[1]
    scores = visit.log_scores.flatten(0, 1)
    num_steps = (scores > -torch.inf).sum(1)
    burnt = (burn_in * num_steps.double()).long()
    done = walk(scores, visit.carried_score.repeat_interleave(num_sets, 0), noise.flatten(0, 1), burnt)
    counted = (num_steps - burnt).view(rows, num_sets).sum(1, keepdim=True).to(scores.dtype)
    weights = done.steps.view_as(visit.log_scores) / (num_chains * counted)[:, :, None]
    step = done.state.view(rows, num_sets, num_chains).gather(1, visit.keep_in[:, None])[:, 0]
    accepted = done.accepted.view(rows, num_sets).sum(1).to(scores.dtype)
    return Move(
        weights=visit.to_columns(weights),
        carried_weights=done.carried_steps.view(rows, num_sets, num_chains).sum(1) / counted,
        state=torch.where(step < 0, step, visit.sets[visit.keep_in, step]),
        acceptance=accepted / (num_chains * num_steps.view(rows, num_sets).sum(1)),
    )


def _with_positive(visit: Visit, walk_over: Callable[[Visit], Move], draws: Draws) -> Move:
    """Move chains where the row's positive is a state too."""
    assert visit.positive_place is not None
    steps, at_positive = _scatter_positive(visit, visit.positive_place, draws)
    number = torch.arange(visit.sets.numel(), device=steps.device).view_as(visit.sets)
    move = walk_over(replace(visit, logits=steps.flatten(1), sets=number, room=None))
    walked = move.weights.view_as(steps)
    own = visit.positive_place[:, None, None].expand(-1, len(visit.sets), 1)
    weights = (walked * ~at_positive).scatter_add_(2, own, (walked * at_positive).sum(2, keepdim=True))
    step = move.state.clamp(min=0)
    of_positive = visit.sets.flatten()[step // visit.sets.shape[1] * visit.sets.shape[1] + own[:, 0]]
    column = torch.where(at_positive.flatten(1).gather(1, step), of_positive, visit.sets.flatten()[step])
    return move._replace(weights=visit.to_columns(weights), state=torch.where(move.state < 0, move.state, column))


def _scatter_positive(visit: Visit, place: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Let each of a set's n steps propose the positive with probability 1 / (n + 1), instead of once at its own place.

    A step that proposes the positive can be left only by other steps. So the target is invariant if each step may
    propose either, but not if the positive comes once per walk. Returns the steps' log scores (rows, sets, n), and
    which of them propose the positive.
    """
    own = place[:, None, None].expand(-1, visit.log_scores.shape[1], 1)
    score = visit.log_scores.gather(2, own)
    scores = visit.log_scores.scatter(2, own, -torch.inf)
    is_step = scores > -torch.inf
    num_steps = is_step.sum(2, keepdim=True)
    at_positive = is_step & (draws.exponential(*scores.shape[1:]) < (1 / num_steps).log1p())
    at_positive.scatter_(2, own, num_steps == 0)  # without other proposals, its own place is the step
    return torch.where(at_positive, score, scores), at_positive


class MHResult(NamedTuple):
    """The path of every chain: ``state`` (rows, N) int64 after each step, ``score`` (rows,) at the end."""

    state: Tensor
    score: Tensor


class Walk(NamedTuple):
    """A summary of walks.

    Attributes:
        steps: (rows, N) counted steps spent at each proposal, summed over a row's chains.
        carried_steps: (rows, chains) counted steps spent at the carried state.
        state: (rows, chains) int64 proposal each chain ends at, -1 for the carried state.
        accepted: (rows,) int64 number of proposals accepted by a row's chains.
    """

    steps: Tensor
    carried_steps: Tensor
    state: Tensor
    accepted: Tensor


def metropolis_hastings(
    log_scores: Tensor, entry_score: Tensor, noise: Tensor, valid: Tensor | None = None
) -> MHResult:
    """Run one Metropolis–Hastings chain per row over the row's proposals, in their order.

    Args:
        log_scores: (rows, N) log scores of the proposals, float32 or float64. Unnormalised; -inf is never accepted. NaN
            is not allowed, and not checked: the states after one mean nothing.
        entry_score: (rows,) log score of the state each chain comes in with; -inf for a chain that has none, whose
            first valid proposal is accepted.
        noise: (rows, N) independent Exp(1) draws, finite.
        valid: (rows, N) bool; a step whose proposal is not valid leaves its chain where it is. Default: all are valid.

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
    score = log_scores.masked_fill(
        threshold == -torch.inf, -torch.inf
    )  # keeps score <= threshold, which composition needs
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


def walk(log_scores: Tensor, carried_score: Tensor, noise: Tensor, burnt: Tensor) -> Walk:
    """Run several chains per row over the row's proposals, and count where they spend their steps.

    The chains are those of `metropolis_hastings`.

    Args:
        log_scores: (rows, N) log scores of the proposals; -inf where there is no proposal, and so no step.
        carried_score: (rows, chains) log score of the state each chain comes in with.
        noise: (rows, chains, N) independent Exp(1) draws.
        burnt: (rows,) int64, how many of the first steps do not count.
    """
    log_scores, carried_score, noise = log_scores.detach(), carried_score.detach(), noise.detach()
    rows, num_chains, num_proposals = noise.shape
    is_step = log_scores > -torch.inf
    counted = is_step & (is_step.cumsum(1) > burnt[:, None])
    x, counts = (tensor.repeat_interleave(num_chains, 0) for tensor in (log_scores, counted))
    path, _ = metropolis_hastings(x, carried_score.flatten(), noise.flatten(0, 1))
    accepted = (path == torch.arange(num_proposals, device=path.device)).view(rows, -1).sum(1)
    steps = x.new_zeros(len(path), num_proposals + 1).scatter_add_(1, path + 1, counts.to(x.dtype))
    steps, state = steps.view(rows, num_chains, -1), path[:, -1].view(rows, num_chains)
    return Walk(steps[..., 1:].sum(1), steps[..., 0], state, accepted)


def _validate(log_scores: Tensor, entry_score: Tensor, noise: Tensor, valid: Tensor | None) -> None:
    if log_scores.ndim != 2 or log_scores.shape[1] == 0:
        raise ValueError(f"log_scores must be (rows, N) with N >= 1, got {tuple(log_scores.shape)}")
    if entry_score.shape != log_scores.shape[:1]:
        raise ValueError(
            f"entry_score must be ({log_scores.shape[0]},) as log_scores has rows, got {tuple(entry_score.shape)}"
        )
    for name, tensor in (("noise", noise), ("valid", valid)):
        if tensor is not None and tensor.shape != log_scores.shape:
            raise ValueError(f"{name} must be {tuple(log_scores.shape)} like log_scores, got {tuple(tensor.shape)}")
    if not log_scores.dtype == entry_score.dtype == noise.dtype or log_scores.dtype not in (
        torch.float32,
        torch.float64,
    ):
        raise TypeError(
            "log_scores, entry_score and noise must share one dtype, float32 or float64, "
            f"got {log_scores.dtype}, {entry_score.dtype}, {noise.dtype}"
        )
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
