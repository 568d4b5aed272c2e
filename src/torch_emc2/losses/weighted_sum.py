"""The one weighted sum of similarities that all estimators share, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_emc2.geometry import Contrast
from torch_emc2.losses.weighting import Carried, Weights
from torch_emc2.rows import Positive, RowBuffer, Rows

__all__ = ["WeightedSum", "with_gradients"]


class WeightedSum:
    """Σ over rows of [ -(1 - w_pos) s_pos + Σ_j w_j s_j + carried ], some rows at a time.

    Σ_rj W_rj <row_r, column_j> is linear in the rows and in the columns, so its gradients W @ columns and W.T @ rows
    are formed at once and no similarities are kept for the backward pass. The same holds for private columns and for
    carried embeddings.
    """

    def __init__(self, contrast: Contrast) -> None:
        self._contrast = contrast
        self._of_rows = RowBuffer()  # the gradients at the rows and at their private columns
        self._by_columns: Tensor | None = None
        self._carried: Carried | None = None
        self._owed: Tensor | None = None

    def add(self, rows: Rows, positive: Positive, weights: Weights) -> None:
        """Add some rows, in their order."""
        minus = rows.positive_weights.neg()
        if weights.positive is not None:
            minus.addcmul_(positive.share, weights.positive[:, None])
        matrix, columns, private = weights.negatives, rows.columns, rows.private
        matrix.scatter_add_(1, rows.positives, minus)
        shared = matrix if private is None else matrix[:, : len(columns)]
        by_rows, by_private = shared @ columns, []
        if self._by_columns is None:
            self._by_columns = shared.T @ rows.vectors
        else:
            self._by_columns.addmm_(shared.T, rows.vectors)
        if private is not None:
            by_rows.add_((matrix[:, None, len(columns) :] @ private)[:, 0])
            by_private.append(matrix[:, len(columns) :, None] * rows.vectors[:, None])
        self._of_rows.add(rows, by_rows, *by_private)

    def add_carried(self, carried: Carried) -> None:
        """Add the negatives from outside the batch, of all rows."""
        self._carried = carried
        self.by_rows.add_(torch.bmm(carried.weight[:, None], carried.met)[:, 0])

    def add_owed(self, owed: Tensor) -> None:
        """Add a gradient (k, d) at the first k candidates, which is not to be scaled."""
        self._owed = owed

    @property
    def by_rows(self) -> Tensor:
        """(rows, d) the gradient at the rows."""
        return self._of_rows.tensors[0]

    def value(self) -> Tensor:
        """Return the sum."""
        value: Tensor = torch.linalg.vecdot(self._contrast.row_vectors, self.by_rows).sum()
        return value

    def gradients(self, scale: float | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor that has a gradient, with its gradient times ``scale``."""
        contrast, by_rows, by_columns = self._contrast, self.by_rows, self._by_columns
        assert by_columns is not None
        if contrast.rows is contrast.candidate_vectors:
            by_columns.add_(by_rows)
        else:
            yield contrast.rows, by_rows * scale
        by_columns.mul_(scale)
        if self._owed is not None:
            by_columns[: len(self._owed)].add_(self._owed)
        yield contrast.candidate_vectors, by_columns
        if contrast.private is not None:
            yield contrast.private, self._of_rows.tensors[1].mul_(scale)
        carried = self._carried
        if carried is not None and carried.encoded is not None and carried.place is not None:
            sent = (carried.weight[:, :, None] * contrast.row_vectors[:, None]).flatten(0, 1)
            by_encoded = torch.zeros_like(carried.encoded).index_add_(0, carried.place.flatten(), sent)
            yield carried.encoded, by_encoded.mul_(scale)


def with_gradients(value: Tensor, gradients: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return ``value`` with gradients, pairs of a tensor and the gradient at it. It can be differentiated once."""
    tensors, of_tensors = zip(*gradients, strict=True)
    joined: Tensor = _WithGradients.apply((value,), *tensors, *of_tensors)
    return joined


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: tuple[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value[0]  # in a tuple, or autograd would take the output for a view of an input

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the weights are constants: a second derivative would be wrong, not missing
            raise RuntimeError("the loss can be differentiated once: take its gradient without create_graph=True")
        saved, (outer,) = ctx.saved_tensors, gradients
        wanted = ctx.needs_input_grad[1 : len(saved) + 1]
        given = [each * outer if want else None for each, want in zip(saved, wanted, strict=True)]
        return (None, *given, *[None] * len(saved))
