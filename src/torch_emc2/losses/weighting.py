"""The one weighted sum of similarities that all estimators share, and what each brings to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.geometry import Contrast, Positive

__all__ = ["Carried", "Scores", "Weights", "log_sum_exp", "weighted_sum"]


class Scores(NamedTuple):
    """How a direction's rows compare with their columns; all detached.

    Attributes:
        logits: (rows, columns) β s_j, -inf where a column is no negative of the row. Estimators may write over it.
        log_mass: (rows,) log Σ_j exp(β s_j) over the row's negatives.
        positive: of every row.
        log_positive: (rows,) log(κ Σ exp(β s_pos)), what the positive counts for beside those negatives; -inf for none.
        temperature: 1 / β.
    """

    logits: Tensor
    log_mass: Tensor
    positive: Positive
    log_positive: Tensor
    temperature: float | Tensor


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


class Weights(NamedTuple):
    """An estimator's answer for a direction, all detached but ``carried.encoded``.

    Attributes:
        negatives: (rows, columns) w_j, zero where a column is no negative. The sum writes over it.
        positive: (rows,) w_pos, or None for zero.
        value: (rows,) the textbook value of the loss, or None where there is none but the estimate of the global loss.
        carried: negatives from outside the batch, or None.
        write: what is to be remembered is written by it, after all that can fail.
        last: numbers for the logs.
    """

    negatives: Tensor
    positive: Tensor | None = None
    value: Tensor | None = None
    carried: Carried | None = None
    write: Callable[[], None] | None = None
    last: dict[str, Tensor] | None = None


def log_sum_exp(logits: Tensor) -> Tensor:
    """Row-wise log Σ exp of (rows, n) logits, -inf where all are; faster than `torch.logsumexp` on the CPU."""
    peak = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    return (logits - peak).exp_().sum(1).log_() + peak[:, 0]


def weighted_sum(contrast: Contrast, positive: Positive, weights: Weights) -> tuple[Tensor, Tensor]:
    """Σ over rows of [ -(1 - w_pos) s_pos + Σ_j w_j s_j + carried ]: a scalar that has its gradient, and its value.

    Σ_rj W_rj <row_r, column_j> is linear in the rows and in the columns, so its gradients W @ columns and W.T @ rows
    are formed at once and the (rows, columns) similarities need not be kept for the backward pass. So with what is the
    row's own, and with carried embeddings.
    """
    rows, columns, own, carried = contrast.rows, contrast.columns, contrast.own, weights.carried
    with torch.no_grad():
        matrix, minus = weights.negatives, -contrast.positive_weights
        if weights.positive is not None:
            minus = minus + positive.share * weights.positive[:, None]
        matrix.scatter_add_(1, contrast.positives, minus)
        shared = matrix[:, : len(columns)]
        by_rows = shared @ columns
        by_columns = shared.T @ rows
        if own is not None:
            by_rows.add_((matrix[:, None, len(columns) :] @ own)[:, 0])
        if carried is not None:
            by_rows.add_(torch.bmm(carried.weight[:, None], carried.met)[:, 0])
        value = (rows * by_rows).sum()
    if rows is columns:
        total = (rows * by_rows.add_(by_columns)).sum()
    else:
        total = (rows * by_rows).sum() + (columns * by_columns).sum()
    if own is not None:
        total = total + (own * (matrix[:, len(columns) :, None] * rows.detach()[:, None])).sum()
    if carried is not None and carried.encoded is not None and carried.place is not None:
        sent = (carried.weight[:, :, None] * rows.detach()[:, None]).flatten(0, 1)
        by_encoded = torch.zeros_like(carried.encoded).index_add_(0, carried.place.flatten(), sent)
        total = total + (carried.encoded * by_encoded).sum()
    return total, value
