"""What all estimators share: a batch of pairs, detached weights, and one weighted sum of similarities.

    ∇L = β · mean over rows of [ -(1 - w_pos) ∇s_pos + Σ_j w_j ∇s_j + the carried negatives' term ]

An estimator is a way to choose the weights (`ContrastiveLoss._weigh`); all else stands here.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from torch_emc2.pairs import Pairs, make_pairs
from torch_emc2.temperature import require_temperature
from torch_emc2.unit import unit_vectors

__all__ = [
    "Carried",
    "CheckedEncode",
    "ContrastiveLoss",
    "Encode",
    "Weights",
    "log_sum_exp",
    "require_int",
]

Encode = Callable[[Tensor], Tensor]
"""``encode(ids)``: embeddings (k, d) of the samples (or views) ``ids`` (k,) with today's weights, with gradient.

All ranks call it equally often, with different ids: one that has none to encode where another has is given one of its
own samples', which then weighs nothing. So it may call a module that `fully_shard` has split among the ranks. Under DDP
it must call the wrapped module itself (``ddp.module``): the wrapper counts on one forward pass a step.
"""


class CheckedEncode(Protocol):
    """The caller's ``encode`` as estimators get it: under the caller's autocast, giving finite unit vectors."""

    def __call__(self, ids: Tensor, *, gradient: bool = True) -> Tensor:
        """Embed ``ids`` (k,): (k, d), with gradient where the caller's mode and ``gradient`` allow it."""


class Carried(NamedTuple):
    """Negatives that are not in the batch, C a row.

    Attributes:
        met: (rows, C, d) the unit vectors that each row meets, detached.
        weight: (rows, C) with these weights.
        encoded: (k, d) the vectors they are copies of, if those have a gradient.
        place: (rows, C) which of ``encoded`` each one is.
    """

    met: Tensor
    weight: Tensor
    encoded: Tensor | None = None
    place: Tensor | None = None


class Weights(NamedTuple):
    """An estimator's answer for a batch, all detached but ``carried.encoded``.

    Attributes:
        negatives: (rows, columns) w_j, zero at the row's own sample. The sum writes over it.
        positive: (rows,) w_pos, or None for zero.
        value: (rows,) the textbook value of the loss, or None where there is none but the estimate of the global loss.
        carried: negatives from outside the batch, or None.
    """

    negatives: Tensor
    positive: Tensor | None = None
    value: Tensor | None = None
    carried: Carried | None = None


class ContrastiveLoss(nn.Module, ABC):
    """A loss over two views of a batch: ``loss(z1, z2, index)``.

    Args:
        temperature: 1 / β; similarities of unit vectors are divided by it. It may be assigned at any time
            (``loss_fn.temperature = 0.1``, by a schedule, on all ranks alike) and holds from the next call on.

    Attributes:
        last: detached numbers of the last call, for logs. ``global_loss`` is every method's batch estimate of the
            global contrastive loss, per negative: ``mean_a[-β s_pos + log mean_j exp(β s_j)]``, that is, the loss less
            the log of the number of negatives. It compares methods and batch sizes, and is 0 when all embeddings are
            equal.
    """

    _needs_index = False
    temperature: float

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        _keep_out_of_graphs()
        self.temperature = temperature
        self.num_samples: int | None = None
        self.last: dict[str, Tensor] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Validate a temperature; not by a property, which a `Parameter` would not be asked for."""
        if name == "temperature":
            value = self._accept_temperature(value)
        super().__setattr__(name, value)

    def _accept_temperature(self, value: Any) -> float:
        return require_temperature(value)

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor | None = None, encode: Encode | None = None) -> Tensor:
        """Return the loss of a batch, a scalar whose gradient is the estimator's.

        Args:
            z1: (b, d) embeddings of the first views; any length, they are normalised here.
            z2: (b, d) embeddings of the second views.
            index: (b,) ids of the samples in the data set, or (b, 2) ids of their views.
            encode: gives carried negatives' embeddings; see `Encode`.

        Raises:
            ValueError, IndexError, TypeError: the input is not usable; no state has changed.
            RuntimeError: it is called under a transform of `torch.func` or in a replica of `nn.DataParallel`, which
                would change the memory in a trace, or a copy of it; no state has changed.

        Under an initialised process group of several ranks the batch is gathered; the mean over ranks of value and
        gradient is what one process computes on the whole batch. Where one rank's input is not usable, all raise.
        The loss can be differentiated once: ``create_graph=True`` raises RuntimeError. It belongs outside of activation
        checkpointing, which would call it twice: chains move with every call. A step that holds it can be compiled: it
        runs between graphs.
        """
        _refuse_tracing(self)
        checked = None if encode is None else _checked(encode, z1)
        with torch.autocast(z1.device.type, enabled=False):
            pairs = make_pairs(
                z1,
                z2,
                index if self._needs_index else None,
                self.num_samples,
                needs_index=self._needs_index,
                alike={**self._alike(), "encode": encode is not None, "training": self.training},
            )
            with torch.no_grad():
                logits = (pairs.rows @ pairs.columns.T).div_(self.temperature)
                positive = logits.gather(1, pairs.positive[:, None])[:, 0]
                logits.scatter_(1, pairs.own_columns, -torch.inf)
                log_mass = log_sum_exp(logits)
                estimate = log_mass - positive - math.log(pairs.num_negatives)
                weights = self._weigh(pairs, logits, log_mass, positive, checked)
            share = pairs.world_size / (2 * pairs.size)  # of a row in the mean over rows, before the mean over ranks
            global_loss = estimate.sum() * share
            self.last.update(global_loss=global_loss, positive_similarity=positive.sum() * (share * self.temperature))
            value = global_loss if weights.value is None else weights.value.sum() * share
            surrogate = _weighted_sum(pairs, weights) * (share / self.temperature)
            loss: Tensor = _DifferentiableOnce.apply(value + (surrogate - surrogate.detach()))
            return loss

    def _alike(self) -> dict[str, object]:
        """Return what must be the same on all ranks, by name: settings, and what tells one memory from another."""
        return {"loss": type(self).__name__, "temperature": self.temperature}

    @abstractmethod
    def _weigh(
        self, pairs: Pairs, logits: Tensor, log_mass: Tensor, positive: Tensor, encode: CheckedEncode | None
    ) -> Weights:
        """Choose the weights; called without gradient.

        Args:
            pairs: the batch.
            logits: (rows, columns) β s_j, -inf at the row's own sample; detached.
            log_mass: (rows,) log Σ_j exp(β s_j) over the row's negatives.
            positive: (rows,) β s_pos.
            encode: as given by the caller, checked.
        """

    def extra_repr(self) -> str:
        """Show the temperature."""
        return f"temperature={self.temperature:g}"


def require_int(name: str, value: Any) -> int:
    """Return a setting that must be a whole number, of Python's or NumPy's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


@cache
def _keep_out_of_graphs() -> None:
    """Let a compiled step call losses as they are. At the first of them: this imports the compiler, for seconds."""
    reason = "a loss and its memory are no part of a graph: compile without fullgraph=True, or the encoder alone"
    ContrastiveLoss.forward = torch.compiler.disable(ContrastiveLoss.forward, reason=reason)  # type: ignore


def _refuse_tracing(loss: nn.Module) -> None:
    """Raise RuntimeError where a call would have no lasting effect, or one on a copy."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "a loss cannot be transformed by torch.func (grad, vmap, …): take its gradient with loss.backward() or "
            "torch.autograd.grad; no state has changed"
        )
    if getattr(loss, "_is_replica", False):
        raise RuntimeError(
            "a loss cannot be part of what nn.DataParallel copies to each device: wrap the encoder alone, or use "
            "DistributedDataParallel; no state has changed"
        )


class _DifferentiableOnce(torch.autograd.Function):
    """The weights are constants: a second derivative would be wrong, not missing."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("the loss can be differentiated once: take its gradient without create_graph=True")
        return gradients[0]


def log_sum_exp(logits: Tensor) -> Tensor:
    """Row-wise log Σ exp of (rows, n) logits with a finite maximum; faster than `torch.logsumexp` on the CPU."""
    peak = logits.amax(1, keepdim=True)
    return (logits - peak).exp_().sum(1).log_() + peak[:, 0]


def _weighted_sum(pairs: Pairs, weights: Weights) -> Tensor:
    """Σ over rows of [ -(1 - w_pos) s_pos + Σ_j w_j s_j + carried ], as a scalar whose gradient costs two matmuls.

    Σ_rj W_rj <row_r, column_j> is linear in the rows and in the columns, so its gradients W @ columns and W.T @ rows
    are formed at once and the (rows, columns) similarities need not be kept for the backward pass. So with carried
    embeddings.
    """
    with torch.no_grad():
        matrix = weights.negatives
        minus = torch.full_like(matrix[:, 0], -1.0) if weights.positive is None else weights.positive - 1
        matrix.scatter_(1, pairs.positive[:, None], minus[:, None])
        by_rows = matrix @ pairs.columns
        by_columns = matrix.T @ pairs.rows
        if (carried := weights.carried) is not None:
            by_rows.add_(torch.bmm(carried.weight[:, None], carried.met)[:, 0])
    if pairs.rows is pairs.columns:
        total = (pairs.rows * by_rows.add_(by_columns)).sum()
    else:
        total = (pairs.rows * by_rows).sum() + (pairs.columns * by_columns).sum()
    if carried is not None and carried.encoded is not None and carried.place is not None:
        sent = (carried.weight[:, :, None] * pairs.rows.detach()[:, None]).flatten(0, 1)
        by_encoded = torch.zeros_like(carried.encoded).index_add_(0, carried.place.flatten(), sent)
        total = total + (carried.encoded * by_encoded).sum()
    return total


def _checked(encode: Encode, z: Tensor) -> CheckedEncode:
    """Run a caller's ``encode`` under the caller's autocast and gradient modes; finite unit vectors (k, d)."""
    device, grad = z.device.type, torch.is_grad_enabled()
    autocast, autocast_dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def encode_unit(ids: Tensor, *, gradient: bool = True) -> Tensor:
        with torch.set_grad_enabled(grad and gradient):
            with torch.autocast(device, dtype=autocast_dtype, enabled=autocast):
                embeddings = encode(ids)
            expected = len(ids), z.shape[1]
            if embeddings.shape != expected:
                raise ValueError(f"encode must return {expected} for {len(ids)} ids, got {tuple(embeddings.shape)}")
            embeddings = embeddings.to(torch.promote_types(z.dtype, torch.float32))
            return unit_vectors(embeddings, lambda row: f"encode({int(ids[row])})")

    return encode_unit
