"""How wrong an estimator's gradient is at fixed embeddings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Literal, cast

import torch
from torch import Tensor

from torch_emc2.exact import global_contrastive_loss
from torch_emc2.losses import ContrastiveLoss

__all__ = ["GradientError", "IdsOf", "gradient_error", "parameter_gradient"]

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
