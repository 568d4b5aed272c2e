"""The interface of kernels, which move the chains of a batch's rows in one visit: arguments and results.

A kernel is a pure function of these tensors, for any state space: a state is a proposal of the batch, or the state that
a chain came in with. A kernel keeps nothing between visits; only the loss has memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torch_emc2.known import NO_ID

__all__ = ["EMPTY", "Draws", "Kernel", "Move", "Visit"]

EMPTY = NO_ID
"""The id that stands for none.

A chain has it if it sits at its row's positive or has never moved; a column, if it has no id or is no negative."""


@dataclass(frozen=True)
class Visit:
    """One visit of every row's chains: sets of proposals, each with one randomly chosen view of the same samples.

    Attributes:
        logits: (rows, columns) log scores of the proposals, unnormalised; -inf where a column is no proposal for that
            row, but not in all of a set.
        sets: (sets, n) int64 columns of each set, in the order of the steps. A column is in one set only or, at the
            same place, in all of them.
        carried_score: (rows, chains) log score of the state each chain comes in with; -inf where it has none.
        keep_in: (rows, chains) int64, the set whose final state each chain keeps, drawn uniformly.
        carried_ids: (rows, chains) int64 ids of the states carried, or `EMPTY`.
        column_ids: (c,) int64 ids of the first c columns, which all rows share.
        private_ids: (rows, columns - c) int64 ids of the other columns, which are private to each row; or None.
        positive_place: (rows,) int64, the place in each set of the column that is the row's positive, if that is a
            state; or None. It is in every set, and its log score allows for that.
        room: (rows, columns) memory that the move may use for its weights, or None.
    """

    logits: Tensor
    sets: Tensor
    carried_score: Tensor
    keep_in: Tensor
    carried_ids: Tensor
    column_ids: Tensor
    private_ids: Tensor | None = None
    positive_place: Tensor | None = None
    room: Tensor | None = None

    @cached_property
    def log_scores(self) -> Tensor:
        """(rows, sets, n) the logits in the order of the steps."""
        return self.logits[:, self.sets]

    @cached_property
    def inside(self) -> Tensor:
        """(rows, sets, chains) whether the carried state is among a set's proposals; true for an empty chain."""
        ids = torch.full(self.logits.shape[1:], EMPTY, device=self.column_ids.device)
        ids[: len(self.column_ids)] = self.column_ids
        among = (self.carried_ids[:, None, :, None] == ids[self.sets][:, None]).any(3)
        others = self.carried_ids == EMPTY
        if self.private_ids is not None:
            others = others | (self.carried_ids[:, :, None] == self.private_ids[:, None]).any(2)
        return among | others[:, None]

    def to_columns(self, weights: Tensor) -> Tensor:
        """Add up weights (rows, sets, n) by column: (rows, columns)."""
        return torch.zeros_like(self.logits).index_add_(1, self.sets.flatten(), weights.flatten(1))


class Move(NamedTuple):
    """Where the chains of a visit went.

    Attributes:
        weights: (rows, columns) estimate of the target's probability of each proposal, mean over the row's chains.
        carried_weights: (rows, chains) the same for each chain's carried state. A row's weights, and the mean of these
            over its chains, sum to one.
        state: (rows, chains) int64, the column at which each chain ends; -1 for its carried state.
        acceptance: (rows,) share of each row's proposals that were accepted.
    """

    weights: Tensor
    carried_weights: Tensor
    state: Tensor
    acceptance: Tensor


class Draws(Protocol):
    """Random numbers of a visit: a function of seed, call and place in the batch, whatever the number of ranks."""

    def exponential(self, *shape: int) -> Tensor:
        """Draw finite Exp(1) numbers (rows, \\*shape); each call in a visit draws new ones."""


class Kernel(ABC):
    """How chains move. A subclass is a frozen dataclass of its settings, which ranks compare by its ``repr``."""

    @abstractmethod
    def move(self, visit: Visit, draws: Draws) -> Move:
        """Move every chain of a visit."""
