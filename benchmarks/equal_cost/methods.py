"""The methods, by name. A method adds the gradient of a batch to the parameters.

A loss of the library is one line in `METHODS`; what needs more than a loss is a function or a file, and one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from guided import guided
from momentum import Slow
from queued import queued
from torch import Tensor
from towers import Tower

from torch_emc2 import (
    DCLLoss,
    EMC2Loss,
    InfoNCELoss,
    MomentumLoss,
    NegativeCacheLoss,
    SogCLRLoss,
    UniformityLoss,
    cached_backward,
    ema_decay,
)
from torch_emc2.losses.sogclr import cosine_gamma

__all__ = ["KAPPAS", "METHODS", "Given", "Method"]

DIRECTIONS = "query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"
KAPPAS: tuple[float | str, ...] = (0.0, "global", 0.05, 0.2, 1.0)


class Given(NamedTuple):
    """What a method is made for.

    Attributes:
        x: queries.
        y: keys.
        batch_size: pairs in memory at a time.
        temperature: 1 / β.
        kappa: the positive's mass; None for the method's own.
        steps: of the whole training.
        seed: of what it draws.
        dim: of the embeddings.
    """

    x: Tower
    y: Tower
    batch_size: int
    temperature: float
    kappa: float | str | None
    steps: int
    seed: int
    dim: int

    @property
    def settings(self) -> dict[str, Any]:
        """What all losses of two towers take."""
        weight = {} if self.kappa is None else {"positive_weight": self.kappa}
        return {"num_samples": self.sizes, "temperature": self.temperature, "towers": 2, **weight}

    @property
    def sizes(self) -> tuple[int, int]:
        """Items on both sides."""
        return len(self.x.first), len(self.y.first)


Step = Callable[[Tensor], Tensor]
"""``step(rows)``: do the forward and backward pass of these training pairs, and return the loss."""


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        title: in the tables.
        make: gives a step.
        kappas: that a search may choose from; none where the method has its own.
        batches: batches a step, of which one is in memory at a time.
    """

    title: str
    make: Callable[[Given], Step]
    kappas: tuple[float | str, ...] = ()
    batches: int = 1


def ours(loss: Callable[..., Any], **settings: Any) -> Callable[[Given], Step]:
    """Train with a loss of the library."""
    return lambda given: _plain(loss(**given.settings, **settings), given)


def _plain(loss_fn: Callable[..., Tensor], given: Given) -> Step:
    x, y = given.x, given.y

    def step(rows: Tensor) -> Tensor:
        encode = x.of_items, y.of_items
        loss = loss_fn(x(rows), y(rows), x.ids[rows], y_index=y.ids[rows], encode=encode)
        loss.backward()
        return loss.detach()

    return step


def of_either(x: Tower, y: Tower, ids: Tensor) -> Tensor:
    """Encode items of both sides, whose ids are x's and, behind them, y's."""
    queries = len(x.first)
    of_x = ids < queries
    sides = (x, of_x, 0), (y, ~of_x, queries)
    found = [tower.of_items(ids[own] - first) for tower, own, first in sides if own.any()]
    return torch.cat(found)[torch.cat([own.nonzero()[:, 0] for _, own, _ in sides]).argsort()]


def together(loss: Callable[..., Any], **settings: Any) -> Callable[[Given], Step]:
    """Train with a loss of the library for which both towers' embeddings are views: all of a batch are negatives."""

    def make(given: Given) -> Step:
        x, y, (queries, _) = given.x, given.y, given.sizes
        alike = {**given.settings, "num_samples": sum(given.sizes), "towers": 1}
        loss_fn = loss(**alike, **settings)

        def step(rows: Tensor) -> Tensor:
            index = torch.stack([x.ids[rows], y.ids[rows] + queries], 1)
            value = loss_fn(x(rows), y(rows), index, encode=partial(of_either, x, y))
            value.backward()
            return value.detach()

        return step

    return make


def with_momentum(given: Given, momentum: float | None = None, **settings: Any) -> Step:
    """Train with a momentum encoder a side, by default of the library's decay; both towers' embeddings are views."""
    x, y, (queries, _) = given.x, given.y, given.sizes
    momentum = momentum or ema_decay(given.batch_size)
    loss_fn = MomentumLoss(given.temperature, positive_weight=given.kappa or 0.0, **settings)
    slow_x = Slow(x, momentum)
    slow_y = Slow(y, momentum, slow_x)

    def step(rows: Tensor) -> Tensor:
        index = torch.stack([x.ids[rows], y.ids[rows] + queries], 1)
        value = loss_fn(x(rows), y(rows), index, slow=(slow_x(rows), slow_y(rows)))
        value.backward()
        return value.detach()

    return step


def _sogclr_cosine(given: Given) -> Step:
    return _plain(SogCLRLoss(**given.settings, gamma=cosine_gamma(given.steps)), given)


def _negative_cache(given: Given) -> Step:
    """Encode as many anew each step as a batch has."""
    fraction = given.batch_size / max(given.sizes)
    return _plain(NegativeCacheLoss(**given.settings, dim=given.dim, refresh_fraction=fraction, seed=given.seed), given)


def _emc2(given: Given, **settings: Any) -> Step:
    return _plain(EMC2Loss(**given.settings, seed=given.seed, **settings), given)


def _emc2_together(given: Given, **settings: Any) -> Step:
    return together(EMC2Loss, kernel="isir", seed=given.seed, **settings)(given)


def _ranking(given: Given, **settings: Any) -> Callable[..., Tensor]:
    """MNRL of embeddings: by its defaults rows are the queries alone; the same item again is a negative."""
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    ranking = MultipleNegativesRankingLoss(None, scale=1 / given.temperature, **settings)
    return lambda x, y: ranking.compute_loss_from_embeddings([x, y], None)


def _mnrl(given: Given, **settings: Any) -> Step:
    ranking = _ranking(given, **settings)

    def step(rows: Tensor) -> Tensor:
        loss = ranking(given.x(rows), given.y(rows))
        loss.backward()
        return loss.detach()

    return step


def _cached_mnrl(given: Given) -> Step:
    """The gradient of CachedMultipleNegativesRankingLoss: GradCache of MNRL."""
    ranking, encoders = _ranking(given), (given.x, given.y)
    return lambda rows: cached_backward(ranking, encoders, (rows, rows), chunk_size=given.batch_size)


def emc2(title: str, **settings: Any) -> Method:
    """A row of EMC² whose κ is searched."""
    return Method(title, partial(_emc2, **settings), KAPPAS)


def _moco_zero(given: Given) -> Step:
    """MoCo with what Momentum has of its own: no positive in the denominator, and a decay by batch size."""
    return queued(given, ema_decay(given.batch_size), positive_weight=0.0)


METHODS = {
    "infonce": Method("InfoNCE", ours(InfoNCELoss)),
    "dcl": Method("DCL", ours(DCLLoss)),
    "in-batch": Method("in-batch, κ searched", ours(DCLLoss), KAPPAS),
    "infonce-together": Method("InfoNCE, all embeddings", together(InfoNCELoss)),
    "dcl-together": Method("DCL, all embeddings", together(DCLLoss)),
    "uniformity": Method("Uniformity", ours(UniformityLoss)),
    "uniformity-together": Method("Uniformity, all embeddings", together(UniformityLoss)),
    "uniformity-kappa-together": Method("Uniformity, κ searched, all embeddings", together(UniformityLoss), KAPPAS),
    **{
        f"uniformity-together-{gamma}": Method(
            f"Uniformity, γ = {gamma}, all embeddings", together(UniformityLoss, gamma=gamma)
        )
        for gamma in (0.002, 0.01, 0.02, 0.1)
    },
    "momentum-together": Method("Momentum, all embeddings", with_momentum),
    "momentum-kappa-together": Method("Momentum, κ searched, all embeddings", with_momentum, KAPPAS),
    **{
        f"momentum-together-{momentum}": Method(
            f"Momentum, {momentum}, all embeddings", partial(with_momentum, momentum=momentum)
        )
        for momentum in (0.9, 0.99, 0.999)
    },
    "in-batch-together": Method("in-batch, κ searched, all embeddings", together(DCLLoss), KAPPAS),
    "isir-together": Method("EMC² isir, cache, all embeddings", _emc2_together, KAPPAS),
    "isir-encode-together": Method(
        "EMC² isir, encode, all embeddings", partial(_emc2_together, carry="encode"), KAPPAS
    ),
    "sogclr-together": Method("SogCLR, γ = 0.9, all embeddings", together(SogCLRLoss, gamma=0.9), KAPPAS),
    "remembered": emc2("EMC² isir, cache, 512 remembered", kernel="isir", num_remembered=512),
    "remembered-together": Method(
        "EMC² isir, cache, 512 remembered, all embeddings",
        partial(_emc2_together, num_remembered=512),
        KAPPAS,
    ),
    "isir-encode": emc2("EMC² isir, encode", kernel="isir", carry="encode"),
    "isir-cache": emc2("EMC² isir, cache", kernel="isir", carry="cache"),
    "isir-defer": emc2("EMC² isir, defer", kernel="isir", carry="defer"),
    "isir-drop": emc2("EMC² isir, drop", kernel="isir", carry="drop"),
    "isir-encode-4": emc2("EMC² isir, encode, 4 chains", kernel="isir", carry="encode", num_chains=4),
    "isir-cache-4": emc2("EMC² isir, cache, 4 chains", kernel="isir", carry="cache", num_chains=4),
    "metropolis-encode": emc2("EMC² metropolis, encode", kernel="metropolis", carry="encode"),
    "metropolis-encode-4": emc2("EMC² metropolis, encode, 4 chains", kernel="metropolis", carry="encode", num_chains=4),
    "metropolis-cache": emc2("EMC² metropolis, cache", kernel="metropolis", carry="cache"),
    "sogclr": Method("SogCLR, γ = 0.9", ours(SogCLRLoss, gamma=0.9), KAPPAS),
    "sogclr-cosine": Method("SogCLR, γ cosine", _sogclr_cosine, KAPPAS),
    "negative-cache": Method("Negative Cache", _negative_cache),
    "mnrl": Method("sentence-transformers MNRL", _mnrl),
    "mnrl-together": Method("sentence-transformers MNRL, all directions", partial(_mnrl, directions=DIRECTIONS)),
    "gist": Method("GIST, the encoder as it comes as guide", guided),
    "cached-mnrl": Method("sentence-transformers cached MNRL, 8 b", _cached_mnrl, batches=8),
    "cross-batch-memory": Method("cross-batch memory", partial(queued, momentum=None)),
    "moco": Method("MoCo, momentum .99", partial(queued, momentum=0.99)),
    "moco-zero": Method("MoCo, κ = 0", _moco_zero),
}
