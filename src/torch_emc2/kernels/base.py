"""What a kernel is given, and what it returns: how the chains of a batch's rows move in one visit.

A kernel is a pure function of these tensors, for any state space: states are proposals of the batch or what a chain
came in with. It keeps nothing, so that the loss alone has memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["EMPTY", "Draws", "Kernel", "Move", "Visit"]

EMPTY = -1
"""The id of no negative: a chain that has it sits at its row's positive, or has never moved."""


@dataclass(frozen=True)
class Visit:
    """One visit of every row's chains: sets of proposals, each with one view, by chance, of the same random samples.

    Attributes:
        log_scores: (rows, sets, n) log scores of the proposals, in the order of the steps; -inf where there is none for
            that row, but not in all of a set. Unnormalised.
        carried_score: (rows, chains) log score of the state each chain comes in with; -inf where it has none.
        keep_in: (rows, chains) int64, a uniform draw of the set whose end a chain is to keep.
        carried_ids: (rows, chains) int64 ids of the states carried, or `EMPTY`.
        shared_ids: (sets, s) int64 ids of proposals that all rows share.
        own_ids: (rows, k) int64 ids of proposals that are the row's alone, in each of its sets; or None.
        positive_place: (rows,) int64, the proposal of each set that is the row's positive, where that is a state; or
            None. It is in every set, and weighed for that.
        room: (rows, sets, n) memory that the move's weights may take, or None.
    """

    log_scores: Tensor
    carried_score: Tensor
    keep_in: Tensor
    carried_ids: Tensor
    shared_ids: Tensor
    own_ids: Tensor | None = None
    positive_place: Tensor | None = None
    room: Tensor | None = None

    @cached_property
    def inside(self) -> Tensor:
        """(rows, sets, chains) whether the carried state is among a set's proposals; an empty chain's positive is."""
        among = torch.stack([torch.isin(self.carried_ids, ids) for ids in self.shared_ids], 1)
        others = self.carried_ids == EMPTY
        if self.own_ids is not None:
            others = others | (self.carried_ids[:, :, None] == self.own_ids[:, None]).any(2)
        return among | others[:, None]


class Move(NamedTuple):
    """Where the chains of a visit went.

    Attributes:
        weights: (rows, sets, n) estimate of the target's probability of each proposal, mean over the row's chains.
        carried_weights: (rows, chains) the same of each chain's carried state. With the row's mean of these a row's
            weights sum to one.
        state: (rows, chains) int64, the proposal of the set ``kept_in`` at which each chain ends; -1 for its carried
            state.
        kept_in: (rows, chains) int64, the set that it was kept in.
        acceptance: () share of proposals that were accepted.
    """

    weights: Tensor
    carried_weights: Tensor
    state: Tensor
    kept_in: Tensor
    acceptance: Tensor


class Draws(Protocol):
    """Random numbers of a visit, a function of seed, call and place in the batch: any number of ranks draws alike."""

    def exponential(self, *shape: int) -> Tensor:
        """Draw finite Exp(1) numbers (rows, \\*shape); each call in a visit draws others."""


class Kernel(ABC):
    """How chains move. A frozen dataclass of its settings, which ranks compare by its ``repr``."""

    @abstractmethod
    def move(self, visit: Visit, draws: Draws) -> Move:
        """Move every chain of a visit."""
