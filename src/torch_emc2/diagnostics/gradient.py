"""How wrong an estimator's gradient is at fixed embeddings, of one tower or of two."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.exact import global_contrastive_loss, two_tower_loss

__all__ = [
    "GradientError",
    "IdsOf",
    "MakeLoss",
    "TwoTowerError",
    "at_rest",
    "gradient_error",
    "parameter_gradient",
    "two_tower_error",
]

IdsOf = Literal["sample", "view"]
MakeLoss = Callable[[int], Callable[..., Tensor]]
"""Builds a fresh loss from a seed: one of this library, or anything that is called like it and returns a scalar.

If it has numbers of its own (``last``), they are averaged too."""

_CHUNK = 4096  # rows and columns of similarities in memory at a time


@dataclass(frozen=True)
class GradientError:
    """Errors of an estimator's gradient, relative to the squared norm of the exact one.

    Attributes:
        epochs: numbers of epochs averaged: 1, 2, 4 … and the largest.
        squared_error: for each of these, the squared error of the mean gradient of that many epochs: squared bias and
            what is left of the variance.
        squared_bias: what remains however many epochs are averaged: the inner product of two independent runs' errors,
            in which variance cancels, averaged over all pairs of runs. It may be below zero by chance.
        standard_error: standard error of ``squared_bias`` over the pairs (which share runs: a guide, not a test).
        variance: one epoch's squared error minus the squared bias.
        last: the loss's own numbers (``loss_fn.last``), averaged over the batches of all epochs averaged; with one
            tower.
        at_parameters: the same errors of the gradient at the parameters, if it was asked for.
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


class TwoTowerError(NamedTuple):
    """Errors of the gradient in both sides' embeddings, in β and, if asked for, at the parameters."""

    x: GradientError
    y: GradientError
    beta: GradientError
    at_parameters: GradientError | None = None


def at_rest(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss as it is called at an encoder that does not move.

    If the loss needs a momentum encoder, that is the encoder itself.
    """
    if not getattr(loss_fn, "needs_slow", False):
        return loss_fn
    return lambda x, y, *args, **further: loss_fn(x, y, *args, slow=(x.detach(), y.detach()), **further)


def gradient_error(
    make_loss: MakeLoss,
    z: Tensor,
    temperature: float,
    batch_size: int,
    *,
    ids: IdsOf = "view",
    positive_mass: float = 0.0,
    epochs: int = 100,
    mixing_epochs: int = 20,
    runs: int = 4,
    to_parameters: Callable[[Tensor], Tensor] | None = None,
) -> GradientError:
    """Measure the error of a loss's gradient at fixed embeddings, averaged over epochs of random batches.

    Args:
        make_loss: builds a fresh loss from a seed. It is called as ``loss(z1, z2, index, encode=…)``, with ids below m,
            or below m · views with an id per view: its ``num_samples``.
        z: (m, views, d) embeddings; with more than two views, each visit of a sample draws two.
        temperature: the loss's, 1 / β.
        batch_size: samples per batch; each epoch is a random order, and what does not fill a batch is left out.
        ids: ``"sample"`` gives the loss an ``index`` (b,); ``"view"`` one of (b, 2), with ids views · sample + view.
        positive_mass: positive mass of the exact objective, `torch_emc2.exact.global_contrastive_loss`.
        epochs: number of epochs averaged in each run, after ``mixing_epochs`` in which chains and averages settle.
        runs: number of runs, independent in their batches and in their loss's seed; at least 2.
        to_parameters: linear map from gradients at ``z`` to flat ones at the parameters, as `parameter_gradient` makes
            it. It is costly, so fewer means are mapped: of each run the first epoch and the mean over all, and the
            numbers of epochs between from the start of the first run only.
    """
    _require(len(z), batch_size, epochs, runs)
    z, views = z.detach().requires_grad_(), z.shape[1]
    objective = global_contrastive_loss(z, temperature, positive_mass=positive_mass, chunk_size=_CHUNK)

    def visit(loss_fn: Callable[..., Tensor], index: Tensor, generator: torch.Generator) -> Tensor:
        def encode(carried: Tensor) -> Tensor:
            if ids == "view":
                return z[carried // views, carried % views]
            # A sample's id stands for any of its views: one is drawn, as an augmentation would.
            return z[carried, torch.randint(views, carried.shape, generator=generator)]

        met = torch.arange(2).expand(batch_size, 2)
        if views > 2:
            met = torch.rand(batch_size, views, generator=generator).argsort(1)[:, :2]
        given = index if ids == "sample" else views * index[:, None] + met
        return loss_fn(z[index, met[:, 0]], z[index, met[:, 1]], given, encode=encode)

    (exact,) = torch.autograd.grad(objective, z)
    at_embeddings, at_parameters = _Errors(exact, epochs), _AtParameters(exact, epochs)
    last: dict[str, float] = defaultdict(float)
    for run, epoch, (gradient,), numbers in _epochs(make_loss, visit, [z], batch_size, epochs, mixing_epochs, runs):
        for name, number in numbers.items():
            last[name] += number / (runs * epochs)
        means = at_embeddings.add(epoch, gradient)
        if to_parameters is not None:
            at_parameters.add(run, epoch, means)
    return at_embeddings.summary(dict(last), at_parameters.summary(to_parameters))


def two_tower_error(
    make_loss: MakeLoss,
    x: Tensor,
    y: Tensor,
    temperature: float,
    batch_size: int,
    *,
    directions: Directions = "both",
    positive_mass: float = 0.0,
    epochs: int = 100,
    mixing_epochs: int = 20,
    runs: int = 4,
    to_parameters: Callable[[Tensor], Tensor] | None = None,
) -> TwoTowerError:
    """Measure the gradient's error in two towers' fixed embeddings and in β, as `gradient_error` does for one tower.

    Args:
        make_loss: builds a fresh loss from a seed. It is called as
            ``loss(x, y, index, encode=(encode_x, encode_y), logit_scale=β)``.
        x: (m, d) embeddings.
        y: (m, d) embeddings of x's partners.
        temperature: 1 / β.
        batch_size: pairs per batch.
        directions: the loss's.
        positive_mass: positive mass of the exact objective, `torch_emc2.exact.two_tower_loss`.
        epochs: as in `gradient_error`.
        mixing_epochs: likewise.
        runs: likewise.
        to_parameters: likewise, with x and y as two views: from (k, m, 2, d).
    """
    _require(len(x), batch_size, epochs, runs)
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    beta = x.new_tensor(1 / temperature).requires_grad_()
    objective = two_tower_loss(x, y, 1 / beta, directions=directions, positive_mass=positive_mass, chunk_size=_CHUNK)

    def visit(loss_fn: Callable[..., Tensor], index: Tensor, generator: torch.Generator) -> Tensor:
        return loss_fn(x[index], y[index], index, encode=(x.__getitem__, y.__getitem__), logit_scale=beta)

    leaves = [x, y, beta]
    exact_x, exact_y, exact_beta = torch.autograd.grad(objective, leaves)
    exact = torch.stack([exact_x, exact_y], 1)
    errors = [_Errors(each, epochs) for each in (exact_x, exact_y, exact_beta)]
    both, at_parameters = _Errors(exact, epochs), _AtParameters(exact, epochs)
    for run, epoch, gradients, _ in _epochs(make_loss, visit, leaves, batch_size, epochs, mixing_epochs, runs):
        for error, gradient in zip(errors, gradients, strict=True):
            error.add(epoch, gradient)
        if to_parameters is not None:
            at_parameters.add(run, epoch, both.add(epoch, torch.stack(gradients[:2], 1)))
    at_x, at_y, at_beta = (error.summary() for error in errors)
    return TwoTowerError(at_x, at_y, at_beta, at_parameters.summary(to_parameters))


def parameter_gradient(
    embed: Callable[[Tensor], Tensor], parameters: list[Tensor], num_samples: int, *, chunk_size: int = 256
) -> Callable[[Tensor], Tensor]:
    """Return the map from k gradients at the embeddings (k, num_samples, views, d) to k flat ones at the parameters.

    Each call embeds again, chunk by chunk, so that memory does not hold the graph of all samples.

    Args:
        embed: function from ids (k,) to embeddings (k, views, d), which must be the same for the same ids, whatever
            chunk they come in (no batch norm in training mode).
        parameters: the parameters to differentiate with respect to.
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


def _require(samples: int, batch_size: int, epochs: int, runs: int) -> None:
    if runs < 2 or epochs < 1 or not 2 <= batch_size <= samples:
        raise ValueError(
            f"runs must be at least 2, epochs at least 1 and batch_size from 2 to the {samples} samples, "
            f"got {runs}, {epochs} and {batch_size}"
        )


class _Errors:
    """Errors of mean gradients, by the number of epochs averaged."""

    def __init__(self, exact: Tensor, epochs: int) -> None:
        self.exact, self.norm = exact, exact.square().sum()
        lengths = [*(2**k for k in range(epochs.bit_length()) if 2**k < epochs), epochs]
        self.squared: dict[int, list[Tensor]] = {n: [] for n in lengths}
        self.longest: list[Tensor] = []  # one per run

    def add(self, epoch: int, gradient: Tensor) -> list[tuple[int, Tensor]]:
        """Add the gradient of a run's epoch, counted from 1; return the means that it completes, with their epochs."""
        if epoch == 1:
            self.sums = {n: torch.zeros_like(self.exact) for n in self.squared}
        means = []
        for n, total in self.sums.items():
            total += gradient
            if epoch % n == 0:
                means.append((n, total / n))
                self.add_mean(*means[-1])
                total.zero_()
        return means

    def add_mean(self, epochs: int, mean: Tensor) -> None:
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


class _AtParameters:
    """Errors of the few mean gradients that are mapped to the parameters."""

    def __init__(self, exact: Tensor, epochs: int) -> None:
        self.epochs, self.means = epochs, [(0, exact)]

    def add(self, run: int, epoch: int, means: list[tuple[int, Tensor]]) -> None:
        """Add what `_Errors.add` returns."""
        self.means += [(n, mean) for n, mean in means if epoch == n and (run == 0 or n in (1, self.epochs))]

    def summary(self, to_parameters: Callable[[Tensor], Tensor] | None) -> GradientError | None:
        if to_parameters is None:
            return None
        lengths, means = zip(*self.means, strict=True)
        exact, *mapped = to_parameters(torch.stack(means))
        errors = _Errors(exact, self.epochs)
        for n, mean in zip(lengths[1:], mapped, strict=True):
            errors.add_mean(n, mean)
        return errors.summary()


def _epochs(
    make_loss: MakeLoss,
    visit: Callable[[Callable[..., Tensor], Tensor, torch.Generator], Tensor],
    leaves: list[Tensor],
    batch_size: int,
    epochs: int,
    mixing_epochs: int,
    runs: int,
) -> Iterator[tuple[int, int, list[Tensor], dict[str, float]]]:
    """Yield run, epoch (from 1), and means over its batches: of the gradients at ``leaves``, of the loss's numbers.

    The first of ``leaves`` has one row per sample; ``visit`` returns a batch's loss.
    """
    batches = len(leaves[0]) // batch_size
    for run in range(runs):
        loss_fn = make_loss(run)
        call, generator = at_rest(loss_fn), torch.Generator().manual_seed(run)
        for epoch in range(1 - mixing_epochs, epochs + 1):
            order = torch.randperm(len(leaves[0]), generator=generator)[: batches * batch_size]
            sums, last = [torch.zeros_like(leaf) for leaf in leaves], defaultdict[str, float](float)
            for index in torch.split(order, batch_size):
                gradients = torch.autograd.grad(visit(call, index, generator), leaves, materialize_grads=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    total += gradient
                for name, number in getattr(loss_fn, "last", {}).items():
                    last[name] += number.item() / batches
            if epoch >= 1:
                yield run, epoch, [total / batches for total in sums], last
