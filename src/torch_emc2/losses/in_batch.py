"""Losses with the batch's negatives only: InfoNCE, and DCL, which leaves the positive out of the denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.geometry import Contrast
from torch_emc2.losses.arguments import NumSamples
from torch_emc2.losses.base import ContrastiveLoss
from torch_emc2.losses.encode import CheckedEncode
from torch_emc2.losses.weighting import Scores, Weighing, Weights
from torch_emc2.rows import Rows
from torch_emc2.settings.losses import PositiveWeight
from torch_emc2.temperature import Temperature
from torch_emc2.validation import Towers

__all__ = ["DCLLoss", "InfoNCELoss", "Softmax"]


class InfoNCELoss(ContrastiveLoss):
    """Cross entropy of the positive against the batch (van den Oord et al. 2018; NT-Xent in Chen et al. 2020; CLIP).

    The value is ``-β s_pos + log(κ exp(β s_pos) + Σ_j exp(β s_j))``; the weights are the softmax over negatives and
    positive.

    Args:
        temperature: 1 / β, or a `Temperature`, which is learnt.
        positive_weight: κ, or ``"global"``; see `ContrastiveLoss`.
        num_samples: size of the data set, for ``"global"``.
        towers: 1 or 2; see `ContrastiveLoss`.
        directions: with two towers; see `ContrastiveLoss`.

    Example::

        >>> loss_fn = InfoNCELoss(temperature=0.07)
        >>> loss = loss_fn(torch.randn(8, 128), torch.randn(8, 128))
    """

    def __init__(
        self,
        temperature: float | Temperature = 0.07,
        *,
        positive_weight: PositiveWeight = 1.0,
        num_samples: NumSamples = None,
        towers: Towers = 1,
        directions: Directions = "both",
    ) -> None:
        super().__init__(
            temperature, num_samples, positive_weight=positive_weight, towers=towers, directions=directions
        )

    def _weighing(self, contrast: Contrast, temperature: float | Tensor, encode: CheckedEncode | None) -> Weighing:
        return Softmax(contrast)


class Softmax(Weighing):
    """Softmax over a row's negatives and its positive."""

    def weigh(self, rows: Rows, scores: Scores) -> Weights:
        """Give each negative, and the positive, its share in the sum of all."""
        log_total = torch.logaddexp(scores.log_mass, scores.log_positive)
        return Weights(
            negatives=scores.relative_to(log_total),
            positive=(scores.log_positive - log_total).exp(),
            value=log_total - scores.positive.mean,
        )


class DCLLoss(InfoNCELoss):
    """``-β s_pos + log Σ_j exp(β s_j)`` over the batch's negatives (Yeh et al. 2022, without its von Mises weights).

    The weights are the softmax over the negatives. This is `InfoNCELoss` with κ = 0.

    Args:
        temperature: 1 / β, or a `Temperature`, which is learnt.
        positive_weight: κ, or ``"global"``; see `ContrastiveLoss`.
        num_samples: size of the data set, for ``"global"``.
        towers: 1 or 2; see `ContrastiveLoss`.
        directions: with two towers; see `ContrastiveLoss`.
    """

    def __init__(
        self,
        temperature: float | Temperature = 0.07,
        *,
        positive_weight: PositiveWeight = 0.0,
        num_samples: NumSamples = None,
        towers: Towers = 1,
        directions: Directions = "both",
    ) -> None:
        super().__init__(
            temperature, positive_weight=positive_weight, num_samples=num_samples, towers=towers, directions=directions
        )
