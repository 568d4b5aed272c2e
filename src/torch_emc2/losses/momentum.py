"""Momentum: positives and more negatives from a slow copy of the encoder, in addition to the batch's own negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_emc2.batch import Directions
from torch_emc2.geometry import Contrast
from torch_emc2.known import NO_ID
from torch_emc2.losses.arguments import NumSamples, require_int
from torch_emc2.losses.encode import CheckedEncode
from torch_emc2.losses.in_batch import Softmax
from torch_emc2.losses.stateful import PerSampleLoss, SampleMemory
from torch_emc2.losses.weighting import Conclusion, Weighing
from torch_emc2.settings.losses import PositiveWeight
from torch_emc2.temperature import Temperature
from torch_emc2.validation import Towers

__all__ = ["MomentumLoss", "ema_decay"]


def ema_decay(batch_size: int) -> float:
    """Return the momentum encoder's decay for a batch size.

    It is 0.99 up to a batch size of 32. Above, it is smaller, so that 3,200 samples are averaged, but at least 0.5.
    Measured on WordNet and emoji (docs/method.md): with large batches there are few steps, and averaging over a hundred
    of them is too slow.
    """
    return max(0.5, min(0.99, 1 - batch_size / 3200))


class MomentumLoss(PerSampleLoss):
    """``-β s(a, slow a⁺) + log[κ exp(β s(a, slow a⁺)) + Σ_batch exp(β s_aj) + Σ_queue exp(β s(a, slow q))]``.

    "Slow" embeddings come from a momentum encoder, an exponential moving average of the encoder (MoCo, He et al. 2020).
    A row is pulled to its positive's slow embedding. It is pushed away from the batch's own embeddings, which have a
    gradient, and from a queue of the most recent slow embeddings. Slow embeddings in the queue stay comparable with
    current ones, where the encoder's own would be stale. So a small batch has as many negatives as the queue is long,
    for one extra forward pass and no extra backward pass.

    `ema_decay` gives the decay of the momentum encoder.

    What differs from MoCo: all views are rows, the batch's own embeddings are negatives in addition to the queue, and
    κ = 0 leaves the positive out of the denominator (Yeh et al. 2022), which matters most (docs/method.md).

    The value is the loss as written, with slow embeddings as constants, and the gradient is the gradient of that. The
    similarity and the global loss in ``last`` are those with slow positives and all these negatives.
    ``last["slow_similarity"]`` is the mean cosine of embeddings and their own slow ones, normally near 1. It falls if
    the slow encoder is not updated, and is low if ``slow`` is in another order than ``x`` and ``y``.

    Args:
        temperature: 1 / β, or a `Temperature`, which is learnt.
        queue_size: number of slow embeddings that are kept, of both views together or, with two towers, of each side;
            4·d bytes each. Choose it between the batch size and the size of the data set.
        positive_weight: κ, or ``"global"``; see `ContrastiveLoss`. Here a row's negatives include the queue's.
        num_samples: size of the data set, for ``"global"``.
        towers: 1 or 2; see `ContrastiveLoss`. Each side has its own queue.
        directions: with two towers; see `ContrastiveLoss`.

    Notes:
        ``index`` is optional. With it, a queued embedding is no negative of any row if its item is in the batch, or was
        paired with an item that is. Pass ``index`` where an epoch is not much longer than the queue, or an item has
        several partners. With an id per view, views that are not in the batch remain negatives, as in all losses.
        ``labels`` raise ValueError, since the queue has none; ``same`` is about the batch only. If an item was queued
        twice, the newer embedding counts.

        The first batch needs negatives of its own, as for `DCLLoss`.

    Raises:
        ValueError: a call without ``slow``.

    Example::

        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> encoder = torch.nn.Linear(32, 16)
        >>> slow_encoder = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        >>> loss_fn = MomentumLoss(temperature=0.1)
        >>> views = torch.randn(2, 8, 32)
        >>> with torch.no_grad():
        ...     slow = slow_encoder(views[0]), slow_encoder(views[1])
        >>> loss = loss_fn(encoder(views[0]), encoder(views[1]), slow=slow)
        >>> slow_encoder.update_parameters(encoder)  # after the optimiser's step
    """

    needs_index = False
    needs_slow = True
    sides: tuple[_Queue, ...]

    def __init__(
        self,
        temperature: float | Temperature = 0.07,
        *,
        queue_size: int = 512,
        positive_weight: PositiveWeight = 0.0,
        num_samples: NumSamples = None,
        towers: Towers = 1,
        directions: Directions = "both",
    ) -> None:
        super().__init__(
            temperature, num_samples, positive_weight=positive_weight, towers=towers, directions=directions
        )
        if require_int("queue_size", queue_size) < 0:
            raise ValueError(f"queue_size must be at least 0, got {queue_size}")
        self.queue_size = int(queue_size)
        self.sides = tuple(_Queue(self.queue_size) for _ in self.sizes)

    def _alike(self, device: str) -> dict[str, object]:
        return {**super()._alike(device), "queue_size": self.queue_size}

    def _widen(self, contrast: Contrast) -> Contrast:
        if contrast.known is not None and contrast.known.labels is not None:
            raise ValueError(f"labels are not known of what is queued: {type(self).__name__} takes none")
        assert contrast.slow is not None
        return contrast.with_queue(*self.sides[contrast.candidates].read(contrast.slow))

    def _weighing(self, contrast: Contrast, temperature: float | Tensor, encode: CheckedEncode | None) -> Weighing:
        return _Queued(contrast, self.sides[contrast.candidates])

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{super().extra_repr()}, queue_size={self.queue_size}"


class _Queued(Softmax):
    """Softmax over all negatives and the positive; the batch's slow embeddings are queued in the end."""

    def __init__(self, contrast: Contrast, queue: _Queue) -> None:
        super().__init__(contrast)
        self.queue = queue

    def conclude(self, kept: tuple[Tensor, ...]) -> Conclusion:
        slow = self.contrast.slow
        assert slow is not None
        ids = slow.new_full((len(slow),), NO_ID, dtype=torch.int64)
        if self.contrast.candidate_ids is not None:
            ids = self.contrast.column_ids[: len(slow)]
        partners = self.contrast.partners()
        by_sample = torch.arange(len(slow), device=slow.device).view(self.contrast.column_views, -1).T.flatten()
        new = ids[by_sample], partners[by_sample], slow[by_sample]  # so that all views leave the queue alike
        similarity = (self.contrast.columns[: len(slow)] * slow).sum(1).mean()
        return Conclusion(write=lambda: self.queue.push(*new), numbers={"slow_similarity": similarity})


class _Queue(SampleMemory):
    """The latest slow embeddings of a side, newest first, with the ids of their samples (or views) and partners.

    Args:
        length: how many are kept.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.ids = torch.empty(0, 1, dtype=torch.int64)  # each one's own, then its partners'
        self.vectors = torch.empty(0, 0, dtype=_KEPT)

    def read(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids (k,), partners (k, p) and vectors (k, d) on the device, and in the dtype, of ``like`` (n, d)."""
        ids = self.ids.to(like.device)
        if not len(ids):
            return ids[:, 0], ids[:, 1:], like[:0]
        if self.vectors.shape[1] != like.shape[1]:
            raise ValueError(
                f"the queue holds embeddings of {self.vectors.shape[1]} dimensions, the batch's have {like.shape[1]}: "
                "build a new loss for another encoder"
            )
        return ids[:, 0], ids[:, 1:], self.vectors.to(like)

    def push(self, ids: Tensor, partners: Tensor, vectors: Tensor) -> None:
        """Put new entries (n,), (n, p), (n, d) first, and drop the oldest beyond ``length``."""
        with torch.inference_mode(False):
            *_, kept = self.read(vectors)
            own, left = torch.cat([ids[:, None], partners], 1)[: self.length], max(0, self.length - len(ids))
            new, old = _alike_wide(own, self.ids[:left].to(own))
            self.ids = torch.cat([new, old])
            self.vectors = torch.cat([vectors[: self.length], kept[:left]]).to(_KEPT)

    def state(self) -> dict[str, Any]:
        return {"ids": self.ids.cpu().clone(), "vectors": self.vectors.cpu().clone()}

    def check(self, state: dict[str, Any]) -> None:
        ids, vectors = state["ids"], state["vectors"]
        fits = isinstance(ids, Tensor) and isinstance(vectors, Tensor) and ids.ndim == vectors.ndim == 2
        if (
            not fits
            or len(ids) != len(vectors)
            or not ids.shape[1]
            or (ids.dtype, vectors.dtype) != (torch.int64, _KEPT)
        ):
            raise ValueError("the saved queue is damaged: it needs ids (k, 1 + p), int64, and vectors (k, d), float32")
        if len(ids) > self.length:
            raise ValueError(f"the saved queue has {len(ids)} embeddings, this loss queue_size={self.length}")
        if not vectors.isfinite().all():
            raise ValueError("the saved queue is damaged: not all of its vectors are finite")

    def load(self, state: dict[str, Any]) -> None:
        with torch.inference_mode(False):
            device = self.ids.device
            self.ids, self.vectors = state["ids"].to(device, copy=True), state["vectors"].to(device, copy=True)

    def forget(self, ids: Tensor) -> None:
        kept = ~torch.isin(self.ids[:, 0], ids.to(self.ids.device))
        self.ids, self.vectors = self.ids[kept], self.vectors[kept]


def _alike_wide(*ids: Tensor) -> list[Tensor]:
    """Pad ids (n, p) with `NO_ID` to the width of the widest."""
    width = max(each.shape[1] for each in ids)
    return [nn.functional.pad(each, (0, width - each.shape[1]), value=NO_ID) for each in ids]


_KEPT = torch.float32
