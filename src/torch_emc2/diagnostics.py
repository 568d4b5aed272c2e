"""How wrong an estimator's gradient is: against the exact one, at fixed embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_emc2.exact import global_contrastive_loss
from torch_emc2.losses import ContrastiveLoss

__all__ = ["GradientError", "clustered_embeddings", "gradient_error"]


IdsOf = Literal["sample", "view", "both"]


class GradientError(NamedTuple):
    """Errors of an estimator's gradient, relative to the squared norm of the exact one.

    Attributes:
        one_epoch: squared error of the mean gradient of one epoch, mean over epochs: bias and variance.
        squared_bias: what remains however many epochs are averaged. Of two independent runs' errors the inner product,
            in which variance drops out; mean over all pairs of runs. May fall below zero by chance.
        standard_error: of ``squared_bias``, over the pairs (which share runs: a guide, not a test).
    """

    one_epoch: float
    squared_bias: float
    standard_error: float


def gradient_error(
    make_loss: Callable[[int], ContrastiveLoss],
    z: Tensor,
    batch_size: int,
    *,
    ids: IdsOf = "view",
    epochs: int = 100,
    mixing_epochs: int = 20,
    runs: int = 4,
) -> GradientError:
    """Measure the gradient at fixed embeddings of two views, averaged over epochs of random batches.

    Args:
        make_loss: a fresh loss for a seed.
        z: (m, 2, d) embeddings.
        batch_size: samples a batch; each epoch is a random order, what does not fill a batch is left out.
        ids: ``"sample"`` gives the loss an ``index`` (b,); ``"view"`` one of (b, 2), ids 2 · sample + view; ``"both"``
            as well, and ``encode`` returns both views of an id's sample.
        epochs: averaged in each run, after ``mixing_epochs`` that let chains and averages settle.
        runs: independent in their batches and in their loss's seed; at least 2.
    """
    temperature = make_loss(0).temperature
    exact = _exact_gradient(z, temperature)
    norm = exact.square().sum()
    one_epoch, errors = [], []
    for run in range(runs):
        total = torch.zeros_like(z)
        gradients = _epoch_gradients(make_loss(run), z, batch_size, ids, mixing_epochs + epochs, seed=run)
        for gradient in islice(gradients, mixing_epochs, None):
            total += gradient
            one_epoch.append((gradient - exact).square().sum() / norm)
        errors.append(total / epochs - exact)
    products = torch.stack([(one * other).sum() / norm for one, other in combinations(errors, 2)])
    spread = products.std() / len(products) ** 0.5 if len(products) > 1 else torch.tensor(torch.nan)
    return GradientError(torch.stack(one_epoch).mean().item(), products.mean().item(), spread.item())


def clustered_embeddings(
    num_samples: int = 500,
    dim: int = 32,
    *,
    clusters: int = 15,
    spread: float = 1.0,
    view_spread: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Two unit vectors a sample around random centres: a data set with hard negatives, (num_samples, 2, dim).

    ``spread`` is the length of a sample's random offset from its unit centre, ``view_spread`` of a view's from its
    sample.
    """
    generator = torch.Generator().manual_seed(seed)

    def offset(*shape: int) -> Tensor:
        return torch.randn(*shape, dim, generator=generator) / math.sqrt(dim)

    centres = F.normalize(offset(clusters), dim=1)
    samples = F.normalize(centres[torch.arange(num_samples) % clusters] + spread * offset(num_samples), dim=1)
    views: Tensor = F.normalize(samples[:, None] + view_spread * offset(num_samples, 2), dim=2)
    return views


def _exact_gradient(z: Tensor, temperature: float) -> Tensor:
    z = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(global_contrastive_loss(z, temperature), z)
    return gradient


def _epoch_gradients(
    loss_fn: ContrastiveLoss, z: Tensor, batch_size: int, ids: IdsOf, epochs: int, seed: int
) -> Iterator[Tensor]:
    """Yield the mean over each epoch's batches of the gradient (m, 2, d)."""
    generator = torch.Generator().manual_seed(seed)
    z = z.detach().requires_grad_()
    batches = len(z) // batch_size

    def encode(carried: Tensor) -> Tensor:
        if ids == "both":
            return z[carried // 2]
        if ids == "view":
            return z[carried // 2, carried % 2]
        # A sample's id stands for any of its views: one is drawn, as an augmentation would.
        return z[carried, torch.randint(2, carried.shape, generator=generator)]

    for _ in range(epochs):
        order = torch.randperm(len(z), generator=generator)[: batches * batch_size]
        z.grad = None
        for index in torch.split(order, batch_size):
            given = index if ids == "sample" else torch.stack([2 * index, 2 * index + 1], 1)
            loss_fn(z[index, 0], z[index, 1], given, encode=encode).backward()
        assert z.grad is not None
        yield z.grad / batches
