"""InfoNCE, the loss of SimCLR: negatives from the batch, the positive in the denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_emc2.losses.base import CheckedEncode, ContrastiveLoss, Weights
from torch_emc2.pairs import Pairs

__all__ = ["InfoNCELoss"]


class InfoNCELoss(ContrastiveLoss):
    """Cross entropy of the positive against the batch (van den Oord et al. 2018; NT-Xent in Chen et al. 2020).

    Weights: softmax over negatives and positive. ``index`` is accepted and ignored.

    Args:
        temperature: 1 / β.

    Example::

        >>> loss_fn = InfoNCELoss(temperature=0.07)
        >>> loss = loss_fn(torch.randn(8, 128), torch.randn(8, 128))
    """

    def _weigh(
        self, pairs: Pairs, logits: Tensor, log_mass: Tensor, positive: Tensor, encode: CheckedEncode | None
    ) -> Weights:
        log_total = torch.logaddexp(log_mass, positive)
        return Weights(
            negatives=logits.sub_(log_total[:, None]).exp_(),
            positive=(positive - log_total).exp(),
            value=log_total - positive,
        )
