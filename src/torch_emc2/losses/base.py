"""What all estimators share: rows against columns, detached weights, and one weighted sum of similarities.

    ∇L = β · mean over rows of [ -(1 - w_pos) ∇s_pos + Σ_j w_j ∇s_j + the carried negatives' term ]

An estimator only chooses the weights (`Weighing.weigh`); everything else is done here. With two directions the loss
is the mean of both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from torch_emc2.batch import Directions, gather_batch, require_negatives
from torch_emc2.geometry import Contrast
from torch_emc2.losses.arguments import NumSamples, log_positive_weight, require_sizes
from torch_emc2.losses.encode import CheckedEncode, Encode, checked_encoders
from torch_emc2.losses.tracing import keep_out_of_graphs, refuse_tracing
from torch_emc2.losses.weighted_sum import WeightedSum, with_gradients
from torch_emc2.losses.weighting import Scores, Weighing, scores_of
from torch_emc2.rows import RowBuffer, Rows, parts
from torch_emc2.settings.losses import PositiveWeight, require_positive_weight
from torch_emc2.temperature import Temperature, require_temperature
from torch_emc2.validation import Inputs, Towers, validate_inputs

__all__ = ["ContrastiveLoss"]


class ContrastiveLoss(nn.Module, ABC):
    """Base class of the contrastive losses, called as ``loss(x, y, index)`` with two views or two towers.

    Args:
        temperature: 1 / β, the number that similarities of unit vectors are divided by. A number may be assigned again
            at any time (``loss_fn.temperature = 0.1``, for example by a schedule, on all ranks alike) and holds from
            the next call on; a `Temperature` is learnt.
        num_samples: size of the data set; with ``towers=2`` one size for both sides or a pair. None if it is not known.
        positive_weight: κ ≥ 0, the positive's weight in the denominator, in addition to the batch's negatives with
            weight 1 each: 0 is the paper's objective, 1 InfoNCE's. ``"global"`` is n / N (n negatives in the batch, N
            in the data), which counts the positive once among all.
        towers: 1: all views are both rows and columns, and a row's positive is the other view of its sample (SimCLR).
            2: ``x`` is one side and ``y`` the other (CLIP; queries and documents), and rows of one side are compared
            with columns of the other.
        directions: with two towers, which side's rows count: ``"x->y"``, ``"y->x"``, or the mean of both.

    Attributes:
        last: detached numbers of the last call, for logs, averaged over directions. ``global_loss`` is, for every
            method, the batch's estimate of the global contrastive loss, per negative:
            ``mean_a[-β s_pos + log mean_j exp(β s_j)]``, that is, the loss minus the log of the number of negatives. It
            can be compared across methods and batch sizes, and is 0 when all embeddings are equal. On several ranks the
            mean over ranks is the whole batch's; a single rank's is its share of that.
    """

    needs_slow = False
    """Whether a call needs ``slow``, a momentum encoder's embeddings."""

    needs_index = False
    """Whether a call needs ``index``."""

    temperature: float | Temperature

    def __init__(
        self,
        temperature: float | Temperature,
        num_samples: NumSamples,
        *,
        positive_weight: PositiveWeight,
        towers: Towers,
        directions: Directions,
    ) -> None:
        super().__init__()
        keep_out_of_graphs(ContrastiveLoss)
        if towers not in get_args(Towers):
            raise ValueError(f"towers must be 1 or 2, got {towers!r}")
        if directions not in get_args(Directions):
            raise ValueError(f"directions must be one of {', '.join(get_args(Directions))}; got {directions!r}")
        if towers == 1 and directions != "both":
            raise ValueError(f"directions={directions!r} is for towers=2")
        self.temperature = temperature
        self.sizes = require_sizes(num_samples, towers)
        self.num_samples: NumSamples = self.sizes[0] if towers == 1 else (self.sizes[0], self.sizes[1])
        self.positive_weight = require_positive_weight(positive_weight, self.sizes)
        self.towers, self.directions = towers, directions
        self._numbers: list[dict[str, _Number]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        """Validate a temperature. A property would not do: `nn.Module` does not call its setter for a `Parameter`."""
        if name == "temperature":
            value = value if isinstance(value, Temperature) else require_temperature(value)
            if not isinstance(value, nn.Module):
                self._modules.pop("temperature", None)
        super().__setattr__(name, value)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        index: Tensor | None = None,
        *,
        y_index: Tensor | None = None,
        hard: Tensor | None = None,
        hard_index: Tensor | None = None,
        same: Tensor | None = None,
        labels: Tensor | None = None,
        slow: Tensor | tuple[Tensor, Tensor] | None = None,
        encode: Encode | tuple[Encode | None, Encode | None] | None = None,
        logit_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of a batch, a scalar whose gradient is the estimator's.

        Embeddings may have any length; they are normalised here.

        Args:
            x: (b, d) embeddings of the first views, or of one side; or (b, views, d) with any number of views, without
                ``y``.
            y: (b, d) embeddings of the second views, or of the other side.
            index: (b,) ids of the samples in the data set, or (b, views) ids of their views; with two towers, the ids
                of x's items. Equal ids are the same item, which is never a negative of its own rows and counts as one
                negative of other rows. Ids may stay on the CPU, which then does not wait for a GPU to read them.
            y_index: (b,) with two towers, the ids of y's items where they differ from x's.
            hard: hard negatives in addition to the batch's, each counting as one of those: (k, d) for all rows, or
                (b, k, d) for the rows of each sample. With two towers they are of y's side, for x's rows.
            hard_index: (k,) or (b, k) their ids.
            same: (b, b) bool, further pairs (x_i, y_j), or pairs of samples with one tower, that are known to belong
                together and therefore are no negatives.
            labels: (b,) classes. Samples of one class are also positives of each other: the positive term is the mean
                over all positives (Khosla et al. 2020).
            slow: embeddings of the same x and y by a momentum encoder, in the same shapes; for `MomentumLoss`.
            encode: function that embeds carried negatives; see `Encode`. With two towers a pair, for x's and y's ids.
            logit_scale: β if the caller learns it, already exponentiated, as open_clip's models return it; used instead
                of the temperature.

        Raises:
            ValueError, IndexError, TypeError: the input cannot be used; no state has changed.
            RuntimeError: the loss is called under a transform of `torch.func` or in a replica of `nn.DataParallel`,
                where the memory would be changed in a trace, or in a copy; no state has changed.

        Under an initialised process group of several ranks the batch is gathered; the mean over ranks of value and
        gradient is what one process computes on the whole batch. If one rank's input cannot be used, all ranks raise.

        The loss can be differentiated once: ``create_graph=True`` raises RuntimeError. Keep it outside of activation
        checkpointing, which would call it twice: chains move with every call. A training step that contains the loss
        can be compiled; the loss runs between graphs.
        """
        refuse_tracing(self)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x must be embeddings, a tensor (b, d), got {type(x).__name__}: what a trainer gives its loss goes "
                "through the model first (docs/trainers.md has the losses for trainers)"
            )
        given = x, y, index, y_index, hard, hard_index, same, labels, slow
        device = x.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        callers = partial(torch.autocast, device, dtype=dtype, enabled=enabled)
        encoders: tuple[CheckedEncode | None, ...] = ()
        beta: Tensor | None = None

        def validate() -> Inputs:
            nonlocal encoders, beta
            if (slow is not None) != self.needs_slow:
                raise ValueError(_SLOW[self.needs_slow].format(type(self).__name__))
            encoders, beta = checked_encoders(encode, x, self.towers, callers), self._beta(logit_scale)
            return validate_inputs(*given, towers=self.towers, needs_index=self.needs_index)

        with torch.autocast(device, enabled=False) if enabled else nullcontext():
            batch = gather_batch(
                validate,
                x.device,
                directions=self.directions,
                num_samples=self.sizes,
                alike=lambda: {
                    **self._alike(device),
                    "temperature": self.temperature if beta is None else float(beta.detach()),
                    "encode": encoders[0] is not None,
                    "encode_y": encoders[1] is not None,
                    "training": self.training,
                },
            )
            contrasts = tuple(map(self._widen, batch))
            every_row = self.needs_index or self.positive_weight in (0, "global")
            require_negatives(batch, contrasts, of_every_row=every_row)
            temperature = cast(float, self.temperature) if beta is None else 1 / beta.detach()
            with torch.no_grad():
                found = [self._compare(each, temperature, encoders[each.candidates], beta) for each in contrasts]
                if self.training:
                    self._remember([each.write for each in found if each.write is not None])
                self._numbers = [each.numbers for each in found]
                value = _mean([each.value for each in found])
            return with_gradients(value, [pair for each in found for pair in each.gradients])

    def _compare(
        self, contrast: Contrast, temperature: float | Tensor, encode: CheckedEncode | None, beta: Tensor | None
    ) -> _Direction:
        """Weigh one direction's negatives, and form the weighted sum."""
        weighing = self._weighing(contrast, temperature, encode)
        total, of_rows = WeightedSum(contrast), RowBuffer()
        for rows in parts(contrast, weighing.width):
            scores = self._score(rows, temperature)
            log_mass = rows.log_mass_in_batch(scores.logits) if contrast.num_remembered else scores.log_mass
            estimate = log_mass - scores.positive.mean - rows.log_num_negatives
            if rows.no_negatives is not None:
                estimate.nan_to_num_(nan=0.0)  # a row without negatives
            weights = weighing.weigh(rows, scores)
            value = self._value(rows, scores, log_mass, estimate) if weights.value is None else weights.value
            total.add(rows, scores.positive, weights)
            of_rows.add(rows, value, estimate, scores.positive.mean, *weights.kept)
        values, estimates, similarities, *kept = of_rows.tensors
        conclusion = weighing.conclude(tuple(kept))
        if conclusion.carried is not None:
            total.add_carried(conclusion.carried)
        directions = 2 if self.towers == 2 and self.directions == "both" else 1
        if conclusion.owed is not None:
            total.add_owed(conclusion.owed / directions)
        ranks = contrast.ranks
        share = ranks.world_size / (contrast.row_views * ranks.size)  # of a row in the mean, before the mean over ranks
        of_mean = share * len(contrast.rows)
        numbers: dict[str, _Number] = {
            "global_loss": (estimates, of_mean),
            "positive_similarity": (similarities, of_mean * temperature),
            **{name: (number, of_mean if number.ndim else 1.0) for name, number in conclusion.numbers.items()},
        }
        gradients = [*total.gradients(share / directions / temperature)]
        if beta is not None:
            gradients.append((beta, total.value() * (share / directions)))
        return _Direction(values.sum() * share, gradients, conclusion.write, numbers)

    def _score(self, rows: Rows, temperature: float | Tensor) -> Scores:
        """Score some rows: β s of their negatives and positives, and the positives' mass κ exp(β s)."""
        logits = rows.similarities(1 / temperature)
        positive = rows.positive(logits)
        log_positive = positive.log_mass
        if self.positive_weight != 1:
            log_positive = log_positive + log_positive_weight(self.positive_weight, rows, self.sizes)
        if self.positive_weight and rows.contrast.num_remembered:
            log_positive = log_positive + rows.log_with_remembered
        return scores_of(rows, rows.mask_(logits), positive, log_positive, temperature)

    def _value(self, rows: Rows, scores: Scores, log_mass: Tensor, estimate: Tensor) -> Tensor:
        """(rows,) ``-β s_pos + log(κ exp(β s_pos) + Σ_j exp(β s_j)) - log n``, over the batch's n negatives."""
        if not self.positive_weight:
            return estimate
        log_positive = scores.log_positive
        if rows.contrast.num_remembered:  # κ is relative to the batch's negatives
            log_positive = log_positive - rows.log_with_remembered
        value = torch.logaddexp(log_mass, log_positive) - scores.positive.mean - rows.log_num_negatives
        return value.masked_fill_(log_mass == -torch.inf, 0.0)

    @property
    def last(self) -> dict[str, Tensor]:
        """Detached numbers of the last call, computed when they are read."""
        each = [{name: number.mean() * by for name, (number, by) in numbers.items()} for numbers in self._numbers]
        return {name: _mean([numbers[name] for numbers in each]) for name in (each[0] if each else ())}

    def _beta(self, logit_scale: Tensor | float | None) -> Tensor | None:
        """Return β as a scalar tensor where it is learnt or given, else None."""
        if logit_scale is not None and isinstance(self.temperature, Temperature):
            raise ValueError("the loss learns a temperature of its own: give it a number, or no logit_scale")
        if logit_scale is not None:
            beta = torch.as_tensor(logit_scale)
        elif isinstance(self.temperature, Temperature):
            beta = self.temperature()
        else:
            return None
        if beta.numel() != 1 or not 0 < float(beta.detach()) < math.inf:
            raise ValueError(
                f"logit_scale must be one positive number, β = 1 / temperature, got {beta.detach()}: "
                "a model's logarithm of it goes in as logit_scale.exp()"
            )
        return beta.reshape(()).to(torch.promote_types(beta.dtype, torch.float32))

    def _alike(self, device: str) -> dict[str, object]:
        """Return what must be the same on all ranks, by name: settings, and what tells one memory from another.

        ``device`` is the type of device that embeddings are on.
        """
        own = {name: getattr(self, name) for name in ("positive_weight", "towers", "directions")}
        return {"loss": type(self).__name__, **own}

    def _widen(self, contrast: Contrast) -> Contrast:
        """Add columns from outside the batch to a direction; on all ranks alike, and without changing any state."""
        return contrast

    @abstractmethod
    def _weighing(self, contrast: Contrast, temperature: float | Tensor, encode: CheckedEncode | None) -> Weighing:
        """Return the object that weighs one direction; called without gradient, on all ranks alike.

        Args:
            contrast: what is contrasted with what.
            temperature: 1 / β.
            encode: the caller's ``encode`` for ids of the columns' side, checked; or None.
        """

    def _remember(self, writes: list[Callable[[], None]]) -> None:
        """Write what is to be remembered of all directions; not called in evaluation mode."""
        for write in writes:
            write()

    def extra_repr(self) -> str:
        """Show the settings."""
        shown = [] if isinstance(self.temperature, Temperature) else [f"temperature={self.temperature:g}"]
        shown += [f"towers=2, directions={self.directions!r}"] if self.towers == 2 else []
        return ", ".join([*shown, f"positive_weight={self.positive_weight}"])


_SLOW = {
    True: "{} needs the batch's embeddings by a momentum encoder, loss(x, y, slow=(…, …)): "
    "torch.optim.swa_utils.AveragedModel makes one",
    False: "{} has no use for slow embeddings: MomentumLoss has",
}

_Number = tuple[Tensor, float | Tensor]
"""A tensor, and what its mean is to be multiplied by."""


class _Direction(NamedTuple):
    """Results of one direction: value, gradients of the directions' mean at tensors that have one, write, numbers."""

    value: Tensor
    gradients: list[tuple[Tensor, Tensor]]
    write: Callable[[], None] | None
    numbers: dict[str, _Number]


def _mean(numbers: list[Tensor]) -> Tensor:
    return numbers[0] if len(numbers) == 1 else torch.stack(numbers).mean(0)
