"""Losses of other libraries, called as ours are; of those that are installed (the extra ``peers``)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class Peer:
    """Another library's loss in the place of one of ours.

    Args:
        loss: called with both views' embeddings, and with samples' ids where it is ``indexed``.
        temperature: 1 / β.
        scale: what makes its gradient that of a mean over all rows of -β s_pos + ….
        indexed: it remembers something of every sample.
    """

    def __init__(
        self, loss: Callable[..., Tensor], temperature: float, *, scale: float = 1.0, indexed: bool = False
    ) -> None:
        self.loss, self.temperature, self.scale, self.indexed = loss, temperature, scale, indexed
        self.last: dict[str, Tensor] = {}

    def __call__(self, z1: Tensor, z2: Tensor, index: Tensor, **_: Any) -> Tensor:
        """Return the loss; ids of two views a sample become the sample's."""
        samples = [index if index.ndim == 1 else index[:, 0] // 2] if self.indexed else []
        return self.scale * self.loss(z1, z2, *samples)


def peers(num_samples: int, temperature: float, device: str = "cpu") -> dict[str, Callable[[int], Peer]]:
    """Return what makes each from a seed, for a data set of so many samples."""
    return dict(_peers(num_samples, temperature, device))


def _peers(num_samples: int, temperature: float, device: str) -> Iterator[tuple[str, Callable[[int], Peer]]]:
    with contextlib.suppress(ImportError):
        from lightly.loss import DCLLoss, NTXentLoss

        yield "lightly, NTXentLoss", lambda _: Peer(NTXentLoss(temperature), temperature)
        yield "lightly, DCLLoss", lambda _: Peer(DCLLoss(temperature), temperature)
    with contextlib.suppress(ImportError):
        from pytorch_metric_learning.losses import NTXentLoss as Pairwise
        from pytorch_metric_learning.losses import SelfSupervisedLoss

        yield (
            "pytorch-metric-learning, NTXentLoss",
            lambda _: Peer(SelfSupervisedLoss(Pairwise(temperature)), temperature),
        )
    with contextlib.suppress(ImportError):
        from libauc.losses import GCLoss_v1

        def gcloss(seed: int) -> Peer:
            with contextlib.redirect_stdout(io.StringIO()):
                loss = GCLoss_v1(num_samples, temperature, device=device)
            # Its loss is τ times ours, and the sum of both views' means.
            return Peer(loss, temperature, scale=1 / (2 * temperature), indexed=True)

        yield "LibAUC, GCLoss_v1", gcloss
    with contextlib.suppress(ImportError):
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        ranking = MultipleNegativesRankingLoss(None, 1 / temperature)

        def both(z1: Tensor, z2: Tensor) -> Tensor:  # each is the anchor once, the other view's are its negatives
            one, other = (ranking.compute_loss_from_embeddings([*pair], None) for pair in ((z1, z2), (z2, z1)))
            return (one + other) / 2

        yield "sentence-transformers, MultipleNegativesRankingLoss (other view)", lambda _: Peer(both, temperature)
