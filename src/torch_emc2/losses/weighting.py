"""What an estimator is: a way to weigh the negatives of one direction of a call, some rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.geometry import Contrast
from torch_emc2.rows import Positive, Rows

__all__ = ["Carried", "Conclusion", "Scores", "Weighing", "Weights", "scores_of"]


class Scores(NamedTuple):
    """How some rows compare with their columns; all detached. Estimators may write over ``logits`` and ``masses``.

    Attributes:
        logits: (rows, columns) β s_j, -inf where a column is no negative of the row.
        masses: (rows, columns) exp(β s_j - peak).
        peak: (rows, 1) the largest of a row's logits.
        log_mass: (rows,) log Σ_j exp(β s_j) over the row's negatives.
        positive: of every row.
        log_positive: (rows,) log(κ Σ exp(β s_pos)), what the positive counts for beside those negatives; -inf for none.
        temperature: 1 / β.
    """

    logits: Tensor
    masses: Tensor
    peak: Tensor
    log_mass: Tensor
    positive: Positive
    log_positive: Tensor
    temperature: float | Tensor

    def relative_to(self, log_total: Tensor) -> Tensor:
        """exp(β s_j - log_total) of (rows,) totals, written over ``masses``."""
        return self.masses.mul_((self.peak - log_total[:, None]).exp_())


class Weights(NamedTuple):
    """An estimator's answer for some rows, detached.

    Attributes:
        negatives: (rows, columns) w_j, zero where a column is no negative. The sum writes over it.
        positive: (rows,) w_pos, or None for zero.
        value: (rows,) the textbook value of the loss, or None where there is none but the estimate of the global loss.
        kept: what else there is to say of every row, (rows, …) each, for `Weighing.conclude`.
    """

    negatives: Tensor
    positive: Tensor | None = None
    value: Tensor | None = None
    kept: tuple[Tensor, ...] = ()


class Carried(NamedTuple):
    """Negatives that are not in the batch, C a row.

    Attributes:
        met: (rows, C, d) the unit vectors that each row meets, detached.
        weight: (rows, C) with these weights.
        encoded: (k, d) the vectors they are copies of, if those have a gradient.
        place: (rows, C) which of ``encoded`` each one is.
    """

    met: Tensor
    weight: Tensor
    encoded: Tensor | None = None
    place: Tensor | None = None


class Conclusion(NamedTuple):
    """What an estimator says when all rows are weighed.

    Attributes:
        carried: negatives from outside the batch, or None.
        owed: (k, d) gradient at the first k of the contrast's ``candidate_vectors`` that earlier batches left to this
            one, or None.
        write: what is to be remembered is written by it, after all that can fail.
        numbers: for the logs, by name: (rows, …) of this rank's rows, whose mean is shown, or () of the whole batch.
    """

    carried: Carried | None = None
    owed: Tensor | None = None
    write: Callable[[], None] | None = None
    numbers: Mapping[str, Tensor] = {}


class Weighing(ABC):
    """One direction of a call, as an estimator sees it. All but `weigh` is called by all ranks alike; no gradient.

    Attributes:
        contrast: what is contrasted with what.
        width: what else a row is compared with, beside its columns: the more, the fewer rows at a time.
    """

    width = 0

    def __init__(self, contrast: Contrast) -> None:
        self.contrast = contrast

    @abstractmethod
    def weigh(self, rows: Rows, scores: Scores) -> Weights:
        """Choose the weights of some rows. No rank waits for another in it: they have different rows."""

    def conclude(self, kept: tuple[Tensor, ...]) -> Conclusion:
        """Say what is met outside of the batch, and what is to be remembered; ``kept`` is now of all rows."""
        return Conclusion()


def scores_of(
    rows: Rows, logits: Tensor, positive: Positive, log_positive: Tensor, temperature: float | Tensor
) -> Scores:
    """Sum up the negatives among logits (rows, columns), which are masked; of a row without any the mass is zero."""
    peak = logits.amax(1, keepdim=True)
    if rows.no_negatives is not None:
        peak.clamp_(min=torch.finfo(logits.dtype).min)
    masses = (logits - peak).exp_()
    log_mass = masses.sum(1).log_().add_(peak[:, 0])
    return Scores(logits, masses, peak, log_mass, positive, log_positive, temperature)
