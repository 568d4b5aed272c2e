"""How wrong an estimator's gradient is, at fixed embeddings, and why: the target that a chain has to draw from, and how
stale what it carries is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_emc2.exact import global_contrastive_loss
from torch_emc2.losses import ContrastiveLoss

__all__ = [
    "GradientError",
    "Staleness",
    "Target",
    "clustered_embeddings",
    "gradient_error",
    "parameter_gradient",
    "score_staleness",
    "target_statistics",
]


IdsOf = Literal["sample", "view"]

_CHUNK = 4096  # rows and columns of similarities in memory at a time


@dataclass(frozen=True)
class GradientError:
    """Errors of an estimator's gradient, relative to the squared norm of the exact one.

    Attributes:
        epochs: numbers of epochs averaged: 1, 2, 4 … and the largest.
        squared_error: of the mean gradient of that many epochs: bias and what is left of the variance.
        squared_bias: what remains however many epochs are averaged. Of two independent runs' errors the inner product,
            in which variance drops out; mean over all pairs of runs. May fall below zero by chance.
        standard_error: of ``squared_bias``, over the pairs (which share runs: a guide, not a test).
        variance: one epoch's squared error less the squared bias.
        last: the loss's own numbers (``loss_fn.last``), mean over the batches of all epochs averaged.
        at_parameters: the same errors of the gradient at the parameters, where it was asked for.
    """

    epochs: list[int]
    squared_error: list[float]
    squared_bias: float
    standard_error: float
    variance: float
    last: dict[str, float] = field(default_factory=dict)
    at_parameters: GradientError | None = None

    @property
    def one_epoch(self) -> float:
        """Squared error of one epoch's mean gradient."""
        return self.squared_error[0]


def gradient_error(
    make_loss: Callable[[int], ContrastiveLoss],
    z: Tensor,
    batch_size: int,
    *,
    ids: IdsOf = "view",
    epochs: int = 100,
    mixing_epochs: int = 20,
    runs: int = 4,
    to_parameters: Callable[[Tensor], Tensor] | None = None,
) -> GradientError:
    """Measure the gradient at fixed embeddings, averaged over epochs of random batches.

    Args:
        make_loss: a fresh loss for a seed.
        z: (m, views, d) embeddings; of more than two views, each visit of a sample draws two.
        batch_size: samples a batch; each epoch is a random order, what does not fill a batch is left out.
        ids: ``"sample"`` gives the loss an ``index`` (b,); ``"view"`` one of (b, 2), ids views · sample + view.
        epochs: averaged in each run, after ``mixing_epochs`` that let chains and averages settle.
        runs: independent in their batches and in their loss's seed; at least 2.
        to_parameters: the linear map from gradients at ``z`` to flat ones at the parameters, as `parameter_gradient`
            makes it. It is costly, so less is averaged there: of each run the first epoch and the mean over all, and
            what is between from the first epochs of the first run.
    """
    if runs < 2 or epochs < 1 or not 2 <= batch_size <= len(z):
        raise ValueError(
            f"runs must be at least 2, epochs at least 1 and batch_size from 2 to the {len(z)} samples, "
            f"got {runs}, {epochs} and {batch_size}"
        )
    exact = _exact_gradient(z, cast(float, make_loss(0).temperature))
    lengths = [*(2**k for k in range(epochs.bit_length()) if 2**k < epochs), epochs]
    at_embeddings = _Errors(exact, lengths)
    to_map: list[tuple[int, Tensor]] = []
    last: dict[str, float] = defaultdict(float)
    for run in range(runs):
        sums = {n: torch.zeros_like(exact) for n in lengths}
        sampled = _epochs(make_loss(run), z, batch_size, ids, mixing_epochs + epochs, seed=run)
        for epoch, (gradient, numbers) in enumerate(islice(sampled, mixing_epochs, None), 1):
            for name, number in numbers.items():
                last[name] += number / (runs * epochs)
            for n, total in sums.items():
                total += gradient
                if epoch % n == 0:
                    at_embeddings.add(n, total / n)
                    if epoch == n and (run == 0 or n in (1, epochs)):
                        to_map.append((n, total / n))
                    total.zero_()
    if to_parameters is None:
        return at_embeddings.summary(dict(last))
    exact, *means = to_parameters(torch.stack([exact, *(mean for _, mean in to_map)]))
    at_parameters = _Errors(exact, lengths)
    for (n, _), mean in zip(to_map, means, strict=True):
        at_parameters.add(n, mean)
    return at_embeddings.summary(dict(last), at_parameters.summary())


def parameter_gradient(
    embed: Callable[[Tensor], Tensor], parameters: list[Tensor], num_samples: int, *, chunk_size: int = 256
) -> Callable[[Tensor], Tensor]:
    """Return the map from k gradients at the embeddings (k, num_samples, views, d) to k flat ones at the parameters.

    Each call embeds again, chunk by chunk, so that memory does not hold the graph of all samples.

    Args:
        embed: ids (k,) -> embeddings (k, views, d); the same for the same ids, whatever chunk they come in (no batch
            norm in training mode).
        parameters: what to differentiate by.
        num_samples: ids are 0 … num_samples - 1.
        chunk_size: samples embedded at a time.
    """

    def to_parameters(gradients: Tensor) -> Tensor:
        total = parameters[0].new_zeros(len(gradients), sum(parameter.numel() for parameter in parameters))
        for ids in torch.split(torch.arange(num_samples), chunk_size):
            z = embed(ids)
            for row, gradient in zip(total, gradients[:, ids].to(z), strict=True):
                parts = torch.autograd.grad(z, parameters, gradient, retain_graph=True, materialize_grads=True)
                row += torch.cat([part.flatten() for part in parts])
        return total

    return to_parameters


@dataclass(frozen=True)
class Target:
    """The softmax over all N negatives that each row's chain has to draw from, over rows.

    Attributes:
        negatives: N.
        perplexity: exp(entropy), the effective number of negatives; mean.
        effective: 1 / Σp², another one, which rare negatives count less in; mean.
        peak: N · max p; mean.
        peak_max: the same; largest.
        steps: after which a chain with uniform proposals is within total variation ½ of the target, whatever its start,
            by λ = 1 - 1 / (N max p) (docs/theory.md); mean.
        steps_max: the same; largest.
        visits: the same mean in visits, which take b - 1 steps.
        visits_max: the largest.
    """

    negatives: int
    perplexity: float
    effective: float
    peak: float
    peak_max: float
    steps: float
    steps_max: float
    visits: float
    visits_max: float


def target_statistics(z: Tensor, temperature: float, batch_size: int) -> Target:
    """Describe the softmax over all negatives of each row of ``z`` (m, views, d), chunk by chunk."""
    m, views, _ = z.shape
    flat = F.normalize(z.detach().to(torch.promote_types(z.dtype, torch.float32)), dim=2).flatten(0, 1)
    sample = torch.arange(m, device=z.device).repeat_interleave(views)
    size = max(1, _CHUNK**2 // len(flat))
    entropies, concentrations, peaks = [], [], []
    for rows in torch.split(torch.arange(len(flat), device=z.device), size):
        own = sample[rows, None] == sample
        log_p = (flat[rows] @ flat.T).div_(temperature).masked_fill_(own, -torch.inf).log_softmax(1)
        p = log_p.exp()
        entropies.append(-(p * log_p.masked_fill(own, 0.0)).sum(1))
        concentrations.append(p.square().sum(1))
        peaks.append(p.amax(1))
    negatives = (m - 1) * views
    peak = (torch.cat(peaks) * negatives).clamp(min=1.0)  # rounding can leave it below
    steps = math.log(2) / -torch.log1p(-1 / peak)
    visit = batch_size - 1
    return Target(
        negatives=negatives,
        perplexity=torch.cat(entropies).exp().mean().item(),
        effective=torch.cat(concentrations).reciprocal().mean().item(),
        peak=peak.mean().item(),
        peak_max=peak.max().item(),
        steps=steps.mean().item(),
        steps_max=steps.max().item(),
        visits=steps.mean().item() / visit,
        visits_max=steps.max().item() / visit,
    )


@dataclass(frozen=True)
class Staleness:
    """Stored log scores of carried negatives against today's.

    Attributes:
        chains: number compared.
        median: of the absolute difference, over chains and the pairs of views that a chain may meet.
        p90: its 90th percentile.
        correlation: of stored and today's scores.
        views_median: the same median between today's scores of disjoint views: the part that is the views' chance, not
            age.
    """

    chains: int
    median: float
    p90: float
    correlation: float
    views_median: float


def score_staleness(stored: Tensor, anchors: Tensor, carried: Tensor, temperature: float) -> Staleness:
    """Compare stored log scores with those of today's embeddings.

    Args:
        stored: (k,) log scores of the similarities that the chains keep; at least 2.
        anchors: (k, 2, d) today's embeddings of two views of each chain's sample.
        carried: (k, 2, d) of the sample it carries.
        temperature: 1 / β.
    """
    today = F.normalize(anchors, dim=2) @ F.normalize(carried, dim=2).mT / temperature  # (k, 2, 2) pairs of views
    stored = stored.to(today)[:, None, None].expand_as(today)
    difference = (stored - today).abs().flatten()
    disjoint = (today - today.flip(1, 2)).abs()
    return Staleness(
        chains=len(today),
        median=difference.quantile(0.5).item(),
        p90=difference.quantile(0.9).item(),
        correlation=torch.corrcoef(torch.stack([stored.flatten(), today.flatten()]))[0, 1].item(),
        views_median=disjoint.flatten().quantile(0.5).item(),
    )


def clustered_embeddings(
    num_samples: int = 500,
    dim: int = 32,
    *,
    clusters: int = 15,
    spread: float = 1.0,
    view_spread: float = 0.5,
    views: int = 2,
    seed: int = 0,
) -> Tensor:
    """Unit vectors of each sample's views around random centres: a data set with hard negatives, (num_samples, views,
    dim).

    ``spread`` is the length of a sample's random offset from its unit centre, ``view_spread`` of a view's from its
    sample.
    """
    generator = torch.Generator().manual_seed(seed)

    def offset(*shape: int) -> Tensor:
        return torch.randn(*shape, dim, generator=generator) / math.sqrt(dim)

    centres = F.normalize(offset(clusters), dim=1)
    samples = F.normalize(centres[torch.arange(num_samples) % clusters] + spread * offset(num_samples), dim=1)
    embeddings: Tensor = F.normalize(samples[:, None] + view_spread * offset(num_samples, views), dim=2)
    return embeddings


class _Errors:
    """Errors of mean gradients, by the number of epochs averaged."""

    def __init__(self, exact: Tensor, lengths: list[int]) -> None:
        self.exact, self.norm = exact, exact.square().sum()
        self.squared: dict[int, list[Tensor]] = {n: [] for n in lengths}
        self.longest: list[Tensor] = []  # one a run

    def add(self, epochs: int, mean: Tensor) -> None:
        error = mean - self.exact
        self.squared[epochs].append(error.square().sum() / self.norm)
        if epochs == max(self.squared):
            self.longest.append(error)

    def summary(
        self, last: dict[str, float] | None = None, at_parameters: GradientError | None = None
    ) -> GradientError:
        squared = [torch.stack(errors).mean().item() for errors in self.squared.values()]
        products = torch.stack([(one * other).sum() / self.norm for one, other in combinations(self.longest, 2)])
        bias = products.mean().item()
        spread = products.std().item() / len(products) ** 0.5 if len(products) > 1 else math.nan
        return GradientError(list(self.squared), squared, bias, spread, squared[0] - bias, last or {}, at_parameters)


def _exact_gradient(z: Tensor, temperature: float) -> Tensor:
    z = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(global_contrastive_loss(z, temperature, chunk_size=_CHUNK), z)
    return gradient


def _epochs(
    loss_fn: ContrastiveLoss, z: Tensor, batch_size: int, ids: IdsOf, epochs: int, seed: int
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """Yield the mean over each epoch's batches of the gradient (m, views, d), and of the loss's own numbers."""
    generator = torch.Generator().manual_seed(seed)
    z = z.detach().requires_grad_()
    batches = len(z) // batch_size

    views = z.shape[1]

    def encode(carried: Tensor) -> Tensor:
        if ids == "view":
            return z[carried // views, carried % views]
        # A sample's id stands for any of its views: one is drawn, as an augmentation would.
        return z[carried, torch.randint(views, carried.shape, generator=generator)]

    for _ in range(epochs):
        order = torch.randperm(len(z), generator=generator)[: batches * batch_size]
        z.grad = None
        last: dict[str, float] = defaultdict(float)
        for index in torch.split(order, batch_size):
            met = torch.arange(2).expand(batch_size, 2)
            if views > 2:
                met = torch.rand(batch_size, views, generator=generator).argsort(1)[:, :2]
            given = index if ids == "sample" else views * index[:, None] + met
            loss_fn(z[index, met[:, 0]], z[index, met[:, 1]], given, encode=encode).backward()
            for name, number in loss_fn.last.items():
                last[name] += number.item() / batches
        assert z.grad is not None
        yield z.grad / batches, last
