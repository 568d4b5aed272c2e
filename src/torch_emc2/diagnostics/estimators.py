"""How wrong each estimator's gradient is for a given encoder and images, and why: what `emc2 diagnose` measures."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from torch_emc2.diagnostics.gradient import GradientError, MakeLoss, gradient_error, parameter_gradient
from torch_emc2.diagnostics.staleness import Staleness
from torch_emc2.diagnostics.target import Target, target_statistics
from torch_emc2.exact import objective_mass
from torch_emc2.losses.registry import LossContext, variants
from torch_emc2.settings.losses import EMC2Config, PositiveWeight

__all__ = ["MIXING_EPOCHS", "Diagnosis", "diagnose", "embed_views"]

MIXING_EPOCHS, RUNS = 20, 3

_LOG = logging.getLogger(__name__)

_CHUNK = 128  # samples whose graph is in memory at a time


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was measured.

    Attributes:
        samples: number of images, with two fixed views each.
        batch_size: samples per batch.
        temperature: 1 / β.
        positive_weight: κ of every estimator; None where each has its own.
        positive_mass: mass of the positive in the exact objective, where each negative has mass 1.
        burn_in: burn-in of the kernel metropolis.
        runs: number of independent runs that each error is a mean over, after ``mixing_epochs``.
        mixing_epochs: epochs before the first that counts.
        target: the distribution that the chains draw from.
        errors: errors of each estimator, by title.
        staleness: staleness of the scores that the run's chains keep; None if it has no chains, or its checkpoint is
            gone.
    """

    samples: int
    batch_size: int
    temperature: float
    positive_weight: PositiveWeight | None
    positive_mass: float
    burn_in: float
    runs: int
    mixing_epochs: int
    target: Target
    errors: dict[str, GradientError]
    staleness: Staleness | None


@torch.no_grad()
def embed_views(encoder: nn.Module, views: Tensor) -> Tensor:
    """Embed images (m, 2, c, s, s), chunk by chunk: unit vectors (m, 2, d) on the CPU, where walks are fastest."""
    return torch.cat([_embed(encoder, chunk).float().cpu() for chunk in torch.split(views, _CHUNK)])


def diagnose(
    encoder: nn.Module,
    views: Tensor,
    temperature: float,
    batch_size: int,
    *,
    positive_weight: PositiveWeight | None = None,
    burn_in: float = 0.5,
    epochs: int = 64,
    mixing_epochs: int = MIXING_EPOCHS,
    further: Mapping[str, MakeLoss] | None = None,
    staleness: Staleness | None = None,
) -> Diagnosis:
    """Measure every estimator at the encoder's weights.

    Progress is shown as a bar on a terminal, and elsewhere as one log line per estimator.

    Args:
        encoder: maps images to embeddings; it is put in evaluation mode.
        views: images (m, 2, c, s, s), two fixed views per sample.
        temperature: 1 / β.
        batch_size: samples per batch, from 2 to m.
        positive_weight: κ of every estimator, and so of the exact objective; by default each has its own, and the
            objective is the paper's, without the positive.
        burn_in: burn-in of the kernel metropolis.
        epochs: the largest number of epochs averaged.
        mixing_epochs: epochs before the first that counts, in which chains and averages settle.
        further: estimators in addition to the library's, by title: each builds a loss from a seed, with ids below 2 ·
            m, one per view.
        staleness: copied into the result.
    """
    if not 2 <= batch_size <= len(views):
        raise ValueError(f"batch_size must be from 2 to the {len(views)} samples, got {batch_size}; change either")
    if epochs < 1 or mixing_epochs < 0:
        raise ValueError(f"epochs must be at least 1 and mixing_epochs not negative, got {epochs} and {mixing_epochs}")
    encoder.eval()
    z = embed_views(encoder, views)
    to_parameters = parameter_gradient(
        lambda ids: _embed(encoder, views[ids]), list(encoder.parameters()), len(views), chunk_size=_CHUNK
    )
    errors = {}
    given = LossContext(2 * len(z), temperature, z.shape[2], 2, positive_weight=positive_weight)
    mass = objective_mass(positive_weight, len(z), batch_size)
    makers: dict[str, MakeLoss] = {
        **variants(given, {"emc2": EMC2Config(burn_in=burn_in, kernel="metropolis")}),
        **(further or {}),
    }
    bar = tqdm(makers.items(), "Diagnosing", leave=False, disable=None)
    for name, make_loss in bar:
        bar.set_postfix_str(name)
        errors[name] = gradient_error(
            make_loss,
            z,
            temperature,
            batch_size,
            positive_mass=mass,
            epochs=epochs,
            mixing_epochs=mixing_epochs,
            runs=RUNS,
            to_parameters=to_parameters,
        )
        if not sys.stderr.isatty():
            _LOG.info("%s: squared bias %.4f (%d of %d)", name, errors[name].squared_bias, len(errors), len(makers))
    target = target_statistics(z, temperature, batch_size)
    return Diagnosis(
        samples=len(z),
        batch_size=batch_size,
        temperature=temperature,
        positive_weight=positive_weight,
        positive_mass=mass,
        burn_in=burn_in,
        runs=RUNS,
        mixing_epochs=mixing_epochs,
        target=target,
        errors=errors,
        staleness=staleness,
    )


def _embed(encoder: nn.Module, views: Tensor) -> Tensor:
    images = views.flatten(0, 1).to(next(encoder.parameters()).device)
    return F.normalize(encoder(images), dim=1).view(len(views), 2, -1)
