"""Alignment and uniformity: the batch's negatives, normalised by one moving average that all rows share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.geometry import Contrast
from torch_emc2.losses.arguments import NumSamples
from torch_emc2.losses.base import ContrastiveLoss
from torch_emc2.losses.calling import CheckedEncode
from torch_emc2.losses.weighting import Conclusion, Scores, Weighing, Weights
from torch_emc2.rows import Rows
from torch_emc2.settings.losses import PositiveWeight
from torch_emc2.temperature import Temperature
from torch_emc2.validation import Towers

__all__ = ["UniformityLoss"]


class UniformityLoss(ContrastiveLoss):
    """``-β E[s_pos] + log E_a E_j exp(β s_aj)``: pairs near, all else evenly spread (Wang and Isola 2020, t = β / 2).

    Against the global contrastive loss, the mean over rows a has gone inside of the logarithm. So one number normalises
    all rows, and a moving average of it knows what a small batch does not: at b = 4 a row has a handful of negatives,
    but u has those of all rows of the last 1 / γ batches. Nothing is remembered of samples, and no ids are needed.

    With ``g_a = mean_j exp(β s_j)`` over a row's negatives, ``w_j = exp(β s_j) / (n ((1 - γ) u + γ g_a))`` and then
    ``u <- (1 - γ) u + γ mean_a g_a`` (``u <- mean_a g_a`` at the first call, which is DCL's): SogCLR's step
    (Yuan et al. 2022), with one average in the place of one a sample. A row's weights sum to 1 / γ at most. ``u`` is
    kept as its logarithm, which no temperature overflows. With a positive weight κ, ``κ exp(β s_pos) / n`` is part of
    ``g``. The value is the batch's estimate of the global contrastive loss, as every estimator's.

    The best temperature is higher than that of losses which normalise each row: begin at .1.

    Args:
        temperature: 1 / β. Where another number is assigned, the average begins anew; one that is learnt, or the
            caller's ``logit_scale``, moves little between two calls and leaves it as it is.
        gamma: γ in (0, 1], the weight of the present batch; 1 is DCL.
        positive_weight: κ, or ``"global"``; see `ContrastiveLoss`.
        num_samples: size of the data set, for ``"global"``.
        towers: 1 or 2; see `ContrastiveLoss`. Each direction has an average of its own.
        directions: of two towers.

    Example::

        >>> loss_fn = UniformityLoss(temperature=0.1)
        >>> loss = loss_fn(torch.randn(4, 128), torch.randn(4, 128))
    """

    def __init__(
        self,
        temperature: float | Temperature = 0.1,
        gamma: float = 0.005,
        *,
        positive_weight: PositiveWeight = 0.0,
        num_samples: NumSamples = None,
        towers: Towers = 1,
        directions: Directions = "both",
    ) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        super().__init__(
            temperature, num_samples, positive_weight=positive_weight, towers=towers, directions=directions
        )
        self.gamma = float(gamma)
        self._calls = 0
        self._log_u = torch.full((towers,), -torch.inf, dtype=torch.float32)  # a direction each

    def _accept_temperature(self, value: Any) -> float | Temperature:
        temperature = super()._accept_temperature(value)
        if temperature != getattr(self, "temperature", temperature):
            self._log_u = torch.full_like(self._log_u, -torch.inf)
        return temperature

    def _alike(self, device: str) -> dict[str, object]:
        return {**super()._alike(device), "gamma": self.gamma, "number of the call": self._calls}

    def _weighing(self, contrast: Contrast, temperature: float | Tensor, encode: CheckedEncode | None) -> Weighing:
        self._log_u = self._log_u.to(contrast.rows.device)
        return _Shared(contrast, self._log_u, self.gamma, weighs_positive=self.positive_weight != 0)

    def _remember(self, writes: list[Any]) -> None:
        super()._remember(writes)
        self._calls += 1

    def get_extra_state(self) -> dict[str, Any]:
        """Return the averages, for ``state_dict()``."""
        return {"calls": self._calls, "log_u": self._log_u.cpu().clone()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over saved averages: the next call does what would have come next.

        Raises:
            ValueError: they are another loss's, or of another number of towers; nothing has changed.
        """
        log_u = state.get("log_u") if isinstance(state, dict) else None
        if not isinstance(log_u, Tensor) or log_u.shape != self._log_u.shape or type(state.get("calls")) is not int:
            raise ValueError(f"the saved state is not that of a {type(self).__name__} with towers={self.towers}")
        self._calls, self._log_u = state["calls"], log_u.to(self._log_u, copy=True)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{super().extra_repr()}, gamma={self.gamma:g}"


class _Shared(Weighing):
    """A row's masses, relative to a moving average of what all rows' are.

    Args:
        contrast: the direction.
        log_u: (directions,) logarithms of the averages; that of the direction is written over in the end.
        gamma: share of this batch in it.
        weighs_positive: whether the positive has a mass.
    """

    def __init__(self, contrast: Contrast, log_u: Tensor, gamma: float, *, weighs_positive: bool) -> None:
        super().__init__(contrast)
        self.log_u, self.gamma, self.weighs_positive = log_u, gamma, weighs_positive

    def _averaged(self, log_g: Tensor) -> Tensor:
        """(1 - γ) u + γ g, in logarithms; g where there is no u yet."""
        before = self.log_u[self.contrast.anchors].to(log_g)
        if self.gamma == 1:
            return log_g
        after = torch.logaddexp(math.log1p(-self.gamma) + before, math.log(self.gamma) + log_g)
        return torch.where(before == -torch.inf, log_g, after)

    def weigh(self, rows: Rows, scores: Scores) -> Weights:
        log_g = torch.logaddexp(scores.log_mass, scores.log_positive) - rows.log_num_negatives
        log_total = self._averaged(log_g) + rows.log_num_negatives
        if rows.no_negatives is not None:  # nor has it a gradient then
            log_total = torch.where(log_g.isfinite(), log_total, scores.log_positive)
        return Weights(
            negatives=scores.relative_to(log_total),
            positive=(scores.log_positive - log_total).exp() if self.weighs_positive else None,
            kept=(log_g,),
        )

    def conclude(self, kept: tuple[Tensor, ...]) -> Conclusion:
        log_g = self.contrast.ranks.gather_rows(kept[0])
        has_negatives = log_g.isfinite()
        mean = log_g.masked_fill(~has_negatives, -torch.inf).logsumexp(0) - has_negatives.sum().clamp(min=1).log()
        after = torch.where(has_negatives.any(), self._averaged(mean), self.log_u[self.contrast.anchors].to(mean))

        def write() -> None:
            self.log_u[self.contrast.anchors] = after.to(self.log_u)

        return Conclusion(write=write)
