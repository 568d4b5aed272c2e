"""Alignment and uniformity: the batch's negatives, normalised by one moving average that all rows share."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.geometry import Contrast
from torch_emc2.losses.arguments import NumSamples
from torch_emc2.losses.encode import CheckedEncode
from torch_emc2.losses.stateful import Memory, StatefulLoss
from torch_emc2.losses.weighting import Conclusion, Scores, Weighing, Weights
from torch_emc2.rows import Rows
from torch_emc2.settings.losses import PositiveWeight
from torch_emc2.temperature import Temperature
from torch_emc2.validation import Towers

__all__ = ["UniformityLoss"]


class UniformityLoss(StatefulLoss):
    """``-β E[s_pos] + log E_a E_j exp(β s_aj)``: pairs close, all else evenly spread (Wang and Isola 2020, t = β / 2).

    Compared with the global contrastive loss, the mean over rows a is inside the logarithm. So a single number
    normalises all rows, and its moving average u includes what a small batch lacks: at b = 4 a row has only a handful
    of negatives, but u has those of all rows of the last 1 / γ batches. Nothing is remembered of samples, and no ids
    are needed.

    With ``g_a = mean_j exp(β s_j)`` over a row's negatives, the weights are
    ``w_j = exp(β s_j) / (n ((1 - γ) u + γ g_a))``, and then ``u <- (1 - γ) u + γ mean_a g_a``. The first call uses
    ``γ = 1``, and has DCL's gradient. This is SogCLR's step (Yuan et al. 2022) with one average instead of one per
    sample. A row's weights sum to at most 1 / γ. With a positive weight κ, ``κ exp(β s_pos) / n`` is part of ``g``.
    ``u`` is kept as its logarithm, which does not overflow at any temperature.

    If β changes, by a schedule or because it is learnt, log u follows its tangent, whose slope ``d log u / dβ`` is the
    mean similarity weighted by mass, and γ is at least 10 times the change of log β.

    The value is not an objective with this gradient. It is the batch's estimate of the global contrastive loss, as for
    SogCLR and EMC². ``last["normaliser_ratio"]`` is u over the batch's own mean of g: about 1 where u keeps up with the
    encoder, and 0 at the first call, before which there is no u.

    The best temperature is higher than for losses that normalise each row: begin with .1.

    Args:
        temperature: 1 / β, or a `Temperature`, which is learnt.
        gamma: γ in (0, 1], the weight of the current batch; with 1 the gradient is DCL's or, with κ, that of the
            softmax with κ.
        positive_weight: κ, or ``"global"``; see `ContrastiveLoss`.
        num_samples: size of the data set, for ``"global"``.
        towers: 1 or 2; see `ContrastiveLoss`. Each direction has its own average.
        directions: with two towers; see `ContrastiveLoss`.

    Example::

        >>> loss_fn = UniformityLoss(temperature=0.1)
        >>> loss = loss_fn(torch.randn(4, 128), torch.randn(4, 128))
    """

    remembers_positive = True
    sides: tuple[_Remembered, ...]

    def __init__(
        self,
        temperature: float | Temperature = 0.1,
        *,
        gamma: float = 0.005,
        positive_weight: PositiveWeight = 0.0,
        num_samples: NumSamples = None,
        towers: Towers = 1,
        directions: Directions = "both",
    ) -> None:
        super().__init__(
            temperature, num_samples, positive_weight=positive_weight, towers=towers, directions=directions
        )
        self.gamma = gamma
        _ = self._gamma  # raises if it is not valid
        self.sides = tuple(_Remembered() for _ in self.sizes)  # one per direction, for the rows of one side

    @property
    def _gamma(self) -> float:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, numbers.Real) or not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be a number in (0, 1], got {self.gamma!r}")
        return float(self.gamma)

    def _alike(self, device: str) -> dict[str, object]:
        return {**super()._alike(device), "gamma": self._gamma}

    def _weighing(self, contrast: Contrast, temperature: float | Tensor, encode: CheckedEncode | None) -> Weighing:
        remembered = self.sides[contrast.anchors]
        average, weight = remembered.read(contrast.rows).at(temperature, self._gamma)
        return _Shared(contrast, average, weight, remembered, weighs_positive=self.positive_weight != 0)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{super().extra_repr()}, gamma={self.gamma}"


class _Average(NamedTuple):
    """A moving average of exp(β s) in one direction; each number is a tensor ().

    Attributes:
        log_u: its logarithm.
        similarity: the mean similarity weighted by mass, d log u / dβ.
        log_beta: the log β that it belongs to; infinite before the first call.
    """

    log_u: Tensor
    similarity: Tensor
    log_beta: Tensor

    def at(self, temperature: float | Tensor, gamma: float) -> tuple[_Average, Tensor]:
        """Return the average moved to another β, and the next batch's weight, which grows with the distance moved."""
        number = temperature if isinstance(temperature, Tensor) else torch.full_like(self.log_beta, temperature)
        log_beta = -number.log().to(_KEPT).to(self.log_beta)  # rounded as it is kept, or a constant β would move
        moved = log_beta - self.log_beta
        log_u = self.log_u + (log_beta.exp() - self.log_beta.exp()) * self.similarity
        return _Average(log_u, self.similarity, log_beta), (moved.abs() / _REACH).clamp_(gamma, 1)

    def with_next(self, log_g: Tensor, weight: Tensor) -> Tensor:
        """log((1 - weight) u + weight g)."""
        return torch.logaddexp(torch.log1p(-weight) + self.log_u, weight.log() + log_g)


class _Remembered(Memory):
    """The moving average of a direction as it is kept between calls: the numbers of an `_Average`."""

    def __init__(self) -> None:
        self.numbers = torch.tensor(_NOTHING, dtype=_KEPT)

    def read(self, like: Tensor) -> _Average:
        """Return the average on the device and of the type of ``like``."""
        return _Average(*self.numbers.to(like))

    def write(self, average: _Average, some: Tensor) -> None:
        """Keep a new average, if there are ``some`` rows with negatives."""
        with torch.inference_mode(False):
            after = torch.stack(average).to(_KEPT)
            self.numbers = torch.where(some, after, self.numbers.to(after.device))

    def state(self) -> dict[str, Any]:
        return {"average": self.numbers.cpu().clone()}

    def check(self, state: dict[str, Any]) -> None:
        numbers, own = state["average"], self.numbers
        if not isinstance(numbers, Tensor) or (numbers.shape, numbers.dtype) != (own.shape, own.dtype):
            raise ValueError("the saved average is damaged: it needs three numbers, float32")
        if not _is_average(numbers.tolist()):
            raise ValueError(f"the saved average is damaged: {numbers.tolist()}")

    def load(self, state: dict[str, Any]) -> None:
        with torch.inference_mode(False):
            self.numbers = state["average"].to(self.numbers.device, copy=True)


_REACH = 0.1  # change of log β over which the tangent is trusted
_NOTHING = -math.inf, 0.0, -math.inf
_KEPT = torch.float32


def _is_average(row: list[float]) -> bool:
    """Return whether numbers can be the result of calls."""
    return tuple(row) == _NOTHING or (all(map(math.isfinite, row)) and abs(row[1]) < 1.001)


class _Shared(Weighing):
    """A row's masses, relative to a moving average over all rows.

    Args:
        contrast: the direction.
        average: the average of the previous calls, at this call's β.
        weight: weight of this batch in the new average.
        remembered: where the average is kept, and replaced in the end.
        weighs_positive: whether the positive has a mass.
    """

    def __init__(
        self, contrast: Contrast, average: _Average, weight: Tensor, remembered: _Remembered, *, weighs_positive: bool
    ) -> None:
        super().__init__(contrast)
        self.average, self.weight, self.remembered = average, weight, remembered
        self.weighs_positive = weighs_positive

    def weigh(self, rows: Rows, scores: Scores) -> Weights:
        log_mass = torch.logaddexp(scores.log_mass, scores.log_positive)
        log_g = log_mass - rows.log_num_negatives
        log_total = self.average.with_next(log_g, self.weight) + rows.log_num_negatives
        if rows.no_negatives is not None:  # a row without negatives has no gradient
            log_total = torch.where(log_g.isfinite(), log_total, scores.log_positive)
        finite = scores.logits.clamp_(min=torch.finfo(scores.logits.dtype).min)
        logit = torch.linalg.vecdot(scores.masses, finite) * (scores.peak[:, 0] - log_mass).exp()  # mass-weighted mean
        of_positive = (scores.log_positive - log_mass).exp()
        return Weights(
            negatives=scores.relative_to(log_total),
            positive=(scores.log_positive - log_total).exp() if self.weighs_positive else None,
            kept=(torch.stack([log_g, logit + of_positive * scores.positive.mean_by_mass], 1),),
        )

    def conclude(self, kept: tuple[Tensor, ...]) -> Conclusion:
        log_g, logit = self.contrast.ranks.gather_rows(kept[0]).unbind(1)
        has_negatives = log_g.isfinite()
        some = has_negatives.any()
        log_g, logit = log_g.masked_fill(~has_negatives, -torch.inf), logit.masked_fill(~has_negatives, 0.0)
        log_mean = log_g.logsumexp(0) - has_negatives.sum().clamp(min=1).log()
        log_u = self.average.with_next(log_mean, self.weight)
        share = (self.weight.log() + log_mean - log_u).exp()  # this batch's share in the sum
        similarity = (log_g.softmax(0) @ logit) / self.average.log_beta.exp()
        after = _Average(
            log_u,
            torch.lerp(self.average.similarity, similarity, share),
            self.average.log_beta,
        )
        ratio = torch.where(some, (self.average.log_u - log_mean).exp(), 0.0)
        return Conclusion(write=lambda: self.remembered.write(after, some), numbers={"normaliser_ratio": ratio})
