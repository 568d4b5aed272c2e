"""Decoupled contrastive learning: InfoNCE without the positive in the denominator."""

from __future__ import annotations

from torch import Tensor

from torch_emc2.losses.base import CheckedEncode, ContrastiveLoss, Weights
from torch_emc2.pairs import Pairs

__all__ = ["DCLLoss"]


class DCLLoss(ContrastiveLoss):
    """``-β s_pos + log Σ_j exp(β s_j)`` over the batch's negatives (Yeh et al. 2022, without its von Mises weights).

    Weights: softmax over the negatives. ``index`` is accepted and ignored.

    Args:
        temperature: 1 / β.
    """

    def _weigh(
        self, pairs: Pairs, logits: Tensor, log_mass: Tensor, positive: Tensor, encode: CheckedEncode | None
    ) -> Weights:
        return Weights(negatives=logits.sub_(log_mass[:, None]).exp_(), value=log_mass - positive)
