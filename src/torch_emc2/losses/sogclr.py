"""SogCLR: the batch's negatives, normalised by a moving average of every row's own denominator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_emc2.losses.base import CheckedEncode, StatefulLoss, Weights
from torch_emc2.pairs import Pairs
from torch_emc2.slots import Slots
from torch_emc2.tables import SampleTable

__all__ = ["SogCLRLoss"]


class SogCLRLoss(StatefulLoss):
    """Stochastic optimisation of the global contrastive loss (Yuan et al. 2022, algorithm 1).

    With ``g_a = mean_j exp(β s_j)`` over the batch's negatives, ``u_a <- (1 - γ) u_a + γ g_a`` (``u_a <- g_a`` at the
    first visit) and ``w_j = exp(β s_j) / (N u_a)``. ``u`` is kept as its logarithm, which no temperature overflows: 8
    bytes an id, a number for each of its two views.

    Args:
        num_samples: size of the data set: ids are below it. None: ids are any int64 but -1, and the table grows.
        temperature: 1 / β.
        gamma: γ in (0, 1], the weight of the present batch; 1 is DCL.
    """

    def __init__(self, num_samples: int | None, temperature: float = 0.07, gamma: float = 0.9) -> None:
        super().__init__(num_samples, temperature)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        self.gamma = gamma
        self._slots = Slots(self.num_samples)
        self._log_u = SampleTable(self.num_samples, (2,), torch.float32, -torch.inf)  # a slot a view; -inf: not visited

    def _weigh(
        self, pairs: Pairs, logits: Tensor, log_mass: Tensor, positive: Tensor, encode: CheckedEncode | None
    ) -> Weights:
        log_n = math.log(pairs.num_negatives)
        log_u = []
        ids = pairs.column_ids
        if self.training:
            slots = self._slots.place(ids)
            self._log_u.make_room(slots)
            self._slots.keep(ids, slots)
        else:
            slots = self._slots.find(ids)
        for view, (log_g, at) in enumerate(zip((log_mass - log_n).view(2, -1), slots.view(2, -1), strict=True)):
            place = view if pairs.index is not None and pairs.index.ndim == 1 else 0
            entry = self._log_u.read(pairs.mine(at)).to(log_g.dtype)
            before = torch.where(entry[:, place] == -torch.inf, log_g, entry[:, place])
            entry[:, place] = math.log(self.gamma) + log_g
            if self.gamma < 1:
                entry[:, place] = torch.logaddexp(entry[:, place], math.log1p(-self.gamma) + before)
            log_u.append(entry[:, place])
            if self.training:
                self._log_u.write(at, pairs.gather(entry))
        return Weights(negatives=logits.sub_(log_n + torch.cat(log_u)[:, None]).exp_())

    def _forget(self, ids: Tensor) -> None:
        self._log_u.erase(self._slots.forget(ids))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the moving averages, and their keys where the table grows."""
        keys, slots = self._slots.keys()
        return {"keys": keys, "log_u": self._log_u.state(slots)}

    def _load(self, state: dict[str, Any]) -> None:
        self._slots.check(state["keys"], state["log_u"])
        self._log_u.check(state["log_u"])
        self._log_u.load(state["log_u"])
        self._slots.load(state["keys"])
