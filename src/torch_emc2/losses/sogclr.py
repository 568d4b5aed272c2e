"""SogCLR: the batch's negatives, normalised by a moving average of every row's own denominator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.geometry import Contrast
from torch_emc2.losses.arguments import NumSamples, require_int
from torch_emc2.losses.encode import CheckedEncode
from torch_emc2.losses.stateful import PerSampleLoss, SampleMemory
from torch_emc2.losses.weighting import Conclusion, Scores, Weighing, Weights
from torch_emc2.memory.slots import Slots
from torch_emc2.memory.tables import SampleTable
from torch_emc2.rows import Rows
from torch_emc2.settings.losses import PositiveWeight
from torch_emc2.temperature import Temperature, require_temperature
from torch_emc2.validation import Towers

__all__ = ["SogCLRLoss", "cosine_gamma"]


def cosine_gamma(num_steps: int, minimum: float = 0.2) -> Callable[[int], float]:
    """Return γ as a function of the number of the call: half a cosine from 1 to ``minimum``, as in FastCLIP.

    Wei et al. 2024 change it once per epoch; here it changes with every step.
    """
    return partial(_cosine, num_steps, minimum)


def _cosine(num_steps: int, minimum: float, call: int) -> float:
    return minimum + (1 - minimum) / 2 * (1 + math.cos(math.pi * min(call / num_steps, 1)))


class SogCLRLoss(PerSampleLoss):
    """Stochastic optimisation of the global contrastive loss (Yuan et al. 2022, algorithm 1).

    With ``g_a = mean_j exp(β s_j)`` over the batch's negatives, ``u_a <- (1 - γ) u_a + γ g_a`` (``u_a <- g_a`` at the
    first visit) and ``w_j = exp(β s_j) / (n u_a)``. ``u`` is kept as its logarithm, which does not overflow at any
    temperature: 8 bytes per id, a number for each of its two views. With a positive weight κ, ``κ exp(β s_pos) / n`` is
    part of ``g``.

    Args:
        num_samples: size of the data set: ids are below it. None: ids are any int64 except -1, and the table grows.
            With ``towers=2`` one size for both sides or a pair.
        temperature: 1 / β, or a `Temperature`, which is learnt. Averages of exp(β s) are valid only near one β. If β is
            learnt or follows a schedule, they stay as they are (as in FastCLIP). A call with a temperature more than 3
            times the last call's, or less than a third of it, raises ValueError. To change it further, `forget` all ids
            first, so that each sample's next visit is a first one, with DCL's gradient; or use another loss.
        gamma: γ in (0, 1], the weight of the current batch; 1 is DCL. Or a function of the number of the call, such as
            `cosine_gamma`.
        views: number of views of a sample, where they share an id.
        positive_weight: κ, or ``"global"``; see `ContrastiveLoss`.
        towers: 1 or 2; see `ContrastiveLoss`.
        directions: with two towers; see `ContrastiveLoss`.
    """

    remembers_positive = True
    sides: tuple[_Averages, ...]

    def __init__(
        self,
        num_samples: NumSamples,
        temperature: float | Temperature = 0.07,
        gamma: float | Callable[[int], float] = 0.9,
        *,
        views: int = 2,
        positive_weight: PositiveWeight = 0.0,
        towers: Towers = 1,
        directions: Directions = "both",
    ) -> None:
        super().__init__(
            temperature, num_samples, positive_weight=positive_weight, towers=towers, directions=directions
        )
        self.gamma = gamma
        _ = self._gamma  # raises if it is not valid
        if require_int("views", views) < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        self.sides = tuple(_Averages(size, views if towers == 1 else 1) for size in self.sizes)

    @property
    def _gamma(self) -> float:
        gamma = self.gamma(self._calls) if callable(self.gamma) else self.gamma
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        return float(gamma)

    def _alike(self, device: str) -> dict[str, object]:
        of_averages = [side.temperature for side in self.sides]
        return {**super()._alike(device), "gamma": self._gamma, "temperature of the averages": of_averages}

    def _weighing(self, contrast: Contrast, temperature: float | Tensor, encode: CheckedEncode | None) -> Weighing:
        averages = self.sides[contrast.anchors]
        averages.require_near(float(temperature))
        views = averages.log_u.data.shape[1]
        if contrast.shared_chains and contrast.row_views != views:
            raise ValueError(f"{contrast.row_views} views share an id: build the loss with views={contrast.row_views}")
        return _Averaged(
            contrast,
            averages,
            self._gamma,
            float(temperature),
            weighs_positive=self.positive_weight != 0,
            writes=self.training,
        )

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{super().extra_repr()}, gamma={'a function' if callable(self.gamma) else self.gamma}"


class _Averaged(Weighing):
    """A row's masses, relative to the moving average of their sum.

    Args:
        contrast: the direction.
        averages: the averages of its anchors.
        gamma: weight of this batch in the average.
        temperature: 1 / β.
        weighs_positive: whether the positive has a mass.
        writes: whether the averages are to be remembered.
    """

    def __init__(
        self,
        contrast: Contrast,
        averages: _Averages,
        gamma: float,
        temperature: float,
        *,
        weighs_positive: bool,
        writes: bool,
    ) -> None:
        super().__init__(contrast)
        self.averages, self.gamma, self.temperature = averages, gamma, temperature
        self.weighs_positive, self.writes = weighs_positive, writes
        ids = contrast.chain_ids
        self.slots = averages.slots.place(ids) if writes else averages.slots.find(ids)
        # A number for each view; where a row has its own id, the first.
        self.entry = averages.log_u.read(self.slots).to(contrast.rows.dtype)
        self.before = contrast.ranks.my_rows(self.entry.T.flatten() if contrast.shared_chains else self.entry[:, 0])

    def weigh(self, rows: Rows, scores: Scores) -> Weights:
        before = self.before[rows.span]
        log_g = torch.logaddexp(scores.log_mass, scores.log_positive) - rows.log_num_negatives
        log_u = math.log(self.gamma) + log_g
        if self.gamma < 1:
            before = torch.where(before == -torch.inf, log_g, before)
            log_u = torch.logaddexp(log_u, math.log1p(-self.gamma) + before)
        log_total = log_u + rows.log_num_negatives
        return Weights(
            negatives=scores.relative_to(log_total),
            positive=(scores.log_positive - log_total).exp() if self.weighs_positive else None,
            kept=(log_u,),
        )

    def conclude(self, kept: tuple[Tensor, ...]) -> Conclusion:
        if not self.writes:
            return Conclusion()
        contrast, averages, entry = self.contrast, self.averages, self.entry
        after = contrast.ranks.gather_rows(kept[0])
        if contrast.shared_chains:
            after = after.view(entry.shape[1], -1).T
        else:
            after = torch.cat([after[:, None], entry[:, 1:]], 1)
        write = averages.writing(contrast.chain_ids, self.slots, after, contrast.first_anchors, self.temperature)
        return Conclusion(write=write)


_REACH = 3.0  # the temperature may grow or fall by this factor from one call to the next


class _Averages(SampleMemory):
    """Logarithms of the averages, one per view, -inf before the first visit; and the temperature of the last call."""

    def __init__(self, num_samples: int | None, views: int) -> None:
        self.slots = Slots(num_samples)
        self.log_u = SampleTable(num_samples, (views,), torch.float32, -torch.inf)
        self.temperature = 1.0  # before the first call it means nothing

    def require_near(self, temperature: float) -> None:
        """Raise ValueError if there are averages and their temperature is too different."""
        near = self.temperature / _REACH <= temperature <= self.temperature * _REACH
        if not near and bool((self.log_u.data > -torch.inf).any()):
            raise ValueError(
                f"SogCLR's averages are of temperature {self.temperature:g} and cannot be converted to "
                f"{temperature:g}: forget(ids) of all samples first, or build a new loss"
            )

    def writing(
        self, ids: Tensor, slots: Tensor, log_u: Tensor, first: Tensor | None, temperature: float
    ) -> Callable[[], None]:
        """Prepare the write of the averages of ``ids`` (k,); of a repeated id only the ``first`` counts."""
        if first is not None:
            ids, slots, log_u = ids[first], slots[first], log_u[first]
        self.log_u.make_room(slots)

        def write() -> None:
            self.slots.keep(ids, slots)
            self.log_u.write(slots, log_u)
            self.temperature = temperature

        return write

    def state(self) -> dict[str, Any]:
        keys, slots = self.slots.keys()
        return {"keys": keys, "log_u": self.log_u.state(slots), "temperature": self.temperature}

    def check(self, state: dict[str, Any]) -> None:
        self.slots.check(state["keys"], state["log_u"])
        self.log_u.check(state["log_u"])
        require_temperature(state["temperature"])

    def load(self, state: dict[str, Any]) -> None:
        self.log_u.load(state["log_u"])
        self.slots.load(state["keys"])
        self.temperature = state["temperature"]

    def forget(self, ids: Tensor) -> None:
        self.log_u.erase(self.slots.forget(ids))
