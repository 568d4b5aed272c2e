"""Losses of other libraries, called as ours are; of those that are installed (the extra ``peers``)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

Loss = Callable[..., Tensor]


def as_ours(loss: Loss, *, scale: float = 1.0, indexed: bool = False) -> Loss:
    """Return a loss of two views' embeddings in the place of one of ours.

    Args:
        loss: called with both views' embeddings, and with samples' ids where it is ``indexed``.
        scale: what makes its gradient that of a mean over all rows of -β s_pos + ….
        indexed: it remembers something of every sample; ids of two views a sample become the sample's.
    """

    def call(z1: Tensor, z2: Tensor, index: Tensor, **_: Any) -> Tensor:
        samples = [index if index.ndim == 1 else index[:, 0] // 2] if indexed else []
        return scale * loss(z1, z2, *samples)

    return call


def peers(num_samples: int, temperature: float, device: str = "cpu") -> dict[str, Callable[[int], Loss]]:
    """Return what makes each from a seed, for a data set of so many samples."""
    return dict(_peers(num_samples, temperature, device))


def _peers(num_samples: int, temperature: float, device: str) -> Iterator[tuple[str, Callable[[int], Loss]]]:
    with contextlib.suppress(ImportError):
        from lightly.loss import DCLLoss, NTXentLoss

        yield "lightly, NTXentLoss", lambda _: as_ours(NTXentLoss(temperature))
        yield "lightly, DCLLoss", lambda _: as_ours(DCLLoss(temperature))
    with contextlib.suppress(ImportError):
        from pytorch_metric_learning.losses import NTXentLoss as Pairwise
        from pytorch_metric_learning.losses import SelfSupervisedLoss

        yield "pytorch-metric-learning, NTXentLoss", lambda _: as_ours(SelfSupervisedLoss(Pairwise(temperature)))
    with contextlib.suppress(ImportError):
        from libauc.losses import GCLoss_v1

        def gcloss(seed: int) -> Loss:
            with contextlib.redirect_stdout(io.StringIO()):
                loss = GCLoss_v1(num_samples, temperature, device=device)
            # Its loss is τ times ours, and the sum of both views' means.
            return as_ours(loss, scale=1 / (2 * temperature), indexed=True)

        yield "LibAUC, GCLoss_v1", gcloss
    with contextlib.suppress(ImportError):
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        both: Any = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        ranking = MultipleNegativesRankingLoss(None, 1 / temperature, **both)

        def other_view(z1: Tensor, z2: Tensor) -> Tensor:  # each row's negatives are the other view's
            return ranking.compute_loss_from_embeddings([z1, z2], None)

        yield "sentence-transformers, MultipleNegativesRankingLoss (other view)", lambda _: as_ours(other_view)
