"""SogCLR: the batch's negatives, normalised by a moving average of every row's own denominator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_emc2.losses.base import CheckedEncode, Weights
from torch_emc2.losses.stateful import StatefulLoss
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
        temperature: 1 / β. Averages of exp(β s) say nothing of another β: once there are some, no other temperature
            may be assigned, nor their state be loaded at one. For a schedule, `forget` all ids at each change, after
            which a first visit is DCL's; EMC² and Negative Cache go on without a loss.
        gamma: γ in (0, 1], the weight of the present batch; 1 is DCL.
    """

    def __init__(self, num_samples: int | None, temperature: float = 0.07, gamma: float = 0.9) -> None:
        super().__init__(num_samples, temperature)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        self.gamma = float(gamma)
        self._slots = Slots(self.num_samples)
        self._log_u = SampleTable(self.num_samples, (2,), torch.float32, -torch.inf)  # a slot a view; -inf: not visited

    def _accept_temperature(self, value: Any) -> float:
        temperature = super()._accept_temperature(value)
        own = getattr(self, "temperature", temperature)  # at first there is none
        if temperature != own and bool((self._log_u.data > -torch.inf).any()):
            raise ValueError(
                f"SogCLR's averages are of temperature {own:g} and cannot be converted to {temperature:g}: forget(ids) "
                "of all samples first, or build a new loss"
            )
        return temperature

    def _alike(self) -> dict[str, object]:
        return {**super()._alike(), "gamma": self.gamma}

    def _weigh(
        self, pairs: Pairs, logits: Tensor, log_mass: Tensor, positive: Tensor, encode: CheckedEncode | None
    ) -> Weights:
        shared = pairs.index is not None and pairs.index.ndim == 1  # by two views, which have an average each
        ids = pairs.view_ids(0) if shared else pairs.column_ids
        slots = self._slots.place(ids) if self.training else self._slots.find(ids)
        own = pairs.mine(slots) if shared else pairs.own_rows(slots)
        entry = self._log_u.read(own).to(log_mass.dtype)  # (local, 2), or (rows, 2) of which the first counts

        log_g = log_mass - math.log(pairs.num_negatives)
        before = entry.T.flatten() if shared else entry[:, 0]
        log_u = math.log(self.gamma) + log_g
        if self.gamma < 1:
            before = torch.where(before == -torch.inf, log_g, before)
            log_u = torch.logaddexp(log_u, math.log1p(-self.gamma) + before)
        if self.training:
            self._log_u.make_room(slots)
            if shared:
                entry = pairs.gather(log_u.view(2, -1).T.contiguous())
            else:
                entry = pairs.gather_rows(torch.stack([log_u, entry[:, 1]], 1))
            self._slots.keep(ids, slots)
            self._log_u.write(slots, entry)
            self._calls += 1
        return Weights(negatives=logits.sub_(math.log(pairs.num_negatives) + log_u[:, None]).exp_())

    def _forget(self, ids: Tensor) -> None:
        self._log_u.erase(self._slots.forget(ids))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the moving averages, their temperature, and their keys where the table grows."""
        keys, slots = self._slots.keys()
        tables = {"keys": keys, "log_u": self._log_u.state(slots)}
        return {**tables, "temperature": self.temperature, "calls": self._calls}

    def _load(self, state: dict[str, Any]) -> None:
        self._slots.check(state["keys"], state["log_u"])
        self._log_u.check(state["log_u"])
        visited = bool((state["log_u"] > -torch.inf).any())
        if visited and state["temperature"] != self.temperature:
            raise ValueError(
                f"the saved averages are of temperature {state['temperature']:g} and cannot be converted to "
                f"{self.temperature:g}: build the loss with the temperature it was saved with"
            )
        self._log_u.load(state["log_u"])
        self._slots.load(state["keys"])
        self._calls = state["calls"]
