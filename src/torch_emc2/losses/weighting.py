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
    """Scores of some rows against their columns; all detached. Estimators may overwrite ``logits`` and ``masses``.

    Attributes:
        logits: (rows, columns) β s_j, -inf where a column is no negative of the row.
        masses: (rows, columns) exp(β s_j - peak).
        peak: (rows, 1) the largest of a row's logits.
        log_mass: (rows,) log Σ_j exp(β s_j) over the row's negatives.
        positive: the positives of every row.
        log_positive: (rows,) log(κ Σ exp(β s_pos)), the positive's mass in addition to those negatives; -inf for none.
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
        """(rows, columns) exp(β s_j - log_total), for totals (rows,), written over ``masses``."""
        return self.masses.mul_((self.peak - log_total[:, None]).exp_())


class Weights(NamedTuple):
    """An estimator's answer for some rows, detached.

    Attributes:
        negatives: (rows, columns) w_j, zero where a column is no negative. The weighted sum overwrites it.
        positive: (rows,) w_pos, or None for zero.
        value: (rows,) the loss's own value, or None if it has none and the estimate of the global loss is returned.
        kept: anything else that `Weighing.conclude` needs of every row, tensors (rows, …).
    """

    negatives: Tensor
    positive: Tensor | None = None
    value: Tensor | None = None
    kept: tuple[Tensor, ...] = ()


class Carried(NamedTuple):
    """Negatives that are not in the batch, C per row.

    Attributes:
        met: (rows, C, d) their unit vectors for each row, detached.
        weight: (rows, C) their weights.
        encoded: (k, d) the vectors that ``met`` holds copies of, if they have a gradient; else None.
        place: (rows, C) which row of ``encoded`` each one is.
    """

    met: Tensor
    weight: Tensor
    encoded: Tensor | None = None
    place: Tensor | None = None


class Conclusion(NamedTuple):
    """An estimator's results once all rows are weighed.

    Attributes:
        carried: negatives from outside the batch, or None.
        owed: (k, d) gradient at the first k of the contrast's ``candidate_vectors`` that earlier batches deferred
            to this one, or None.
        write: function that writes what is to be remembered, called after everything that can fail; or None.
        numbers: for the logs, by name: (rows, …) of this rank's rows, whose mean is shown, or () of the whole batch.
    """

    carried: Carried | None = None
    owed: Tensor | None = None
    write: Callable[[], None] | None = None
    numbers: Mapping[str, Tensor] = {}


class Weighing(ABC):
    """One direction of a call, as an estimator sees it; without gradient.

    Everything except `weigh` is called on all ranks alike.

    Attributes:
        contrast: what is contrasted with what.
        width: number of entries that a row is compared with in addition to its columns; the more, the fewer rows at a
            time.
    """

    width = 0

    def __init__(self, contrast: Contrast) -> None:
        self.contrast = contrast

    @abstractmethod
    def weigh(self, rows: Rows, scores: Scores) -> Weights:
        """Choose the weights of some rows. It must not wait for other ranks, which have different rows."""

    def conclude(self, kept: tuple[Tensor, ...]) -> Conclusion:
        """Return the negatives from outside the batch, and what to remember; ``kept`` is now of all rows."""
        return Conclusion()


def scores_of(
    rows: Rows, logits: Tensor, positive: Positive, log_positive: Tensor, temperature: float | Tensor
) -> Scores:
    """Sum the negatives' masses in masked logits (rows, columns); the mass of a row without negatives is zero."""
    peak = logits.amax(1, keepdim=True)
    if rows.no_negatives is not None:
        peak.clamp_(min=torch.finfo(logits.dtype).min)
    masses = (logits - peak).exp_()
    log_mass = masses.sum(1).log_().add_(peak[:, 0])
    return Scores(logits, masses, peak, log_mass, positive, log_positive, temperature)
