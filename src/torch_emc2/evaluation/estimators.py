"""How wrong each estimator's gradient is for a given encoder and images, and why: what `emc2 diagnose` measures."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from torch_emc2.diagnostics import (
    GradientError,
    MakeLoss,
    Staleness,
    Target,
    gradient_error,
    parameter_gradient,
    target_statistics,
)
from torch_emc2.exact import objective_mass
from torch_emc2.losses.registry import Given, variants
from torch_emc2.settings.losses import EMC2Config, PositiveWeight

__all__ = ["Diagnosis", "diagnose", "embed_views", "error_table", "to_markdown"]

MIXING_EPOCHS, RUNS = 20, 3

_LOG = logging.getLogger(__name__)

_CHUNK = 128  # samples whose graph is in memory at a time


@dataclass(frozen=True)
class Diagnosis:
    """All that was measured.

    Attributes:
        samples: number of images, with two fixed views each.
        batch_size: samples a batch.
        temperature: 1 / β.
        positive_weight: κ of every estimator; None where each has its own.
        positive_mass: what the positive counts for in the exact objective, where each negative counts 1.
        burn_in: that of the kernel metropolis.
        runs: independent ones that each error is a mean over, after ``mixing_epochs``.
        mixing_epochs: epochs before the first that counts.
        target: the distribution that the chains draw from.
        errors: of each estimator.
        staleness: of the scores that the run's chains keep; None where it has no chains, or no checkpoint any more.
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
    """Measure every estimator at the encoder's weights, with a progress bar on a terminal, a line each without one.

    Args:
        encoder: images to embeddings, put in evaluation mode.
        views: images (m, 2, c, s, s), two fixed views a sample.
        temperature: 1 / β.
        batch_size: samples a batch, from 2 to m.
        positive_weight: κ of every estimator, and so of the exact objective; by default each has its own, and the
            objective is the paper's, without the positive.
        burn_in: that of the kernel metropolis.
        epochs: the largest number of epochs averaged.
        mixing_epochs: epochs before the first that counts, in which chains and averages settle.
        further: estimators beside the library's, by title: each from a seed, with ids below views · m, a view each.
        staleness: goes into the result as it is.
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
    given = Given(2 * len(z), temperature, z.shape[2], 2, positive_weight=positive_weight)
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


def error_table(errors: dict[str, GradientError]) -> str:
    """Write the squared error by the number of epochs averaged as a Markdown table, with 1 / n to compare with."""
    (lengths,) = {tuple(error.epochs) for error in errors.values()}
    lines = [
        f"| epochs averaged | {' | '.join(str(n) for n in lengths)} | variance | squared bias ± s.e. |",
        "|---|" + "--:|" * (len(lengths) + 2),
        f"| 1 / n | {' | '.join(f'{1 / n:.4f}' for n in lengths)} | 1 | 0 |",
    ]
    for name, error in errors.items():
        by_epochs = " | ".join(f"{value:.4f}" for value in error.squared_error)
        bias = f"{error.squared_bias:.4f} ± {error.standard_error:.2g}"
        lines.append(f"| {name} | {by_epochs} | {error.variance:.4f} | {bias} |")
    return "\n".join(lines) + "\n"


def to_markdown(diagnosis: Diagnosis) -> str:
    """Write the diagnosis as tables."""
    target, stale = diagnosis.target, diagnosis.staleness
    at_parameters = {name: cast(GradientError, error.at_parameters) for name, error in diagnosis.errors.items()}
    chains = [
        f"| {name} | {error.last['acceptance']:.3f} | {error.last['carried_share']:.3f} |"
        for name, error in diagnosis.errors.items()
        if "acceptance" in error.last
    ]
    parts = [
        f"{diagnosis.samples} samples of two fixed views, batches of {diagnosis.batch_size}, "
        f"β = {1 / diagnosis.temperature:.4g}; EMC² is with the kernel metropolis, burn-in {diagnosis.burn_in:g}, "
        "where it does not say isir; "
        f"{diagnosis.runs} runs after {diagnosis.mixing_epochs} epochs of mixing. "
        "Errors are squared, and relative to the squared norm of the exact gradient.",
        _objective(diagnosis),
        *_cautions(diagnosis),
        "Gradient at the embeddings:",
        error_table(diagnosis.errors).rstrip(),
        "Gradient at the parameters:",
        error_table(at_parameters).rstrip(),
        "Chains:",
        "\n".join(["| | acceptance | carried share |", "|---|--:|--:|", *chains]),
        f"Target, the softmax of a row over {target.negatives} negatives:",
        "\n".join([
            "| | mean of rows | largest |",
            "|---|--:|--:|",
            f"| effective negatives, exp(entropy) | {target.perplexity:.1f} | |",
            f"| effective negatives, 1 / Σp² | {target.effective:.1f} | |",
            f"| N · max p | {target.peak:.1f} | {target.peak_max:.1f} |",
            f"| steps to forget the start, at most | {target.steps:.1f} | {target.steps_max:.1f} |",
            f"| visits to forget the start, at most | {target.visits:.2f} | {target.visits_max:.2f} |",
        ]),
    ]  # fmt: skip
    if stale is not None:
        parts += [
            f"Stored scores of {stale.chains} chains against today's:",
            "\n".join([
                "| median difference | 90th percentile | correlation | median between views |",
                "|--:|--:|--:|--:|",
                f"| {stale.median:.3f} | {stale.p90:.3f} | {stale.correlation:.3f} | {stale.views_median:.3f} |",
            ]),
        ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _cautions(diagnosis: Diagnosis) -> list[str]:
    """Say what keeps these numbers from being those of the whole data set."""
    samples, batch_size, visits = diagnosis.samples, diagnosis.batch_size, diagnosis.target.visits
    said = []
    if 4 * batch_size > samples:
        said.append(
            f"Batches of {batch_size} are much of these {samples} samples, which hides the bias of all that know "
            "a batch alone: take more samples, or smaller batches."
        )
    if 4 * visits > diagnosis.mixing_epochs:
        said.append(
            f"Chains may take {visits:.0f} visits to come near their target, and had {diagnosis.mixing_epochs} before "
            f"what counts: some of EMC²'s bias may be their start. --mixing-epochs {math.ceil(4 * visits)} would tell."
        )
    return said


def _objective(diagnosis: Diagnosis) -> str:
    if diagnosis.positive_weight is None:
        return (
            "The exact objective has no positive in the denominator; each estimator keeps its own weight of it, "
            "InfoNCE's 1 and Negative Cache's n / N. Uniformity is of another objective, the mean over rows inside of "
            "the logarithm: its bias is how far that one's gradient is."
        )
    return (
        f"Every estimator has positive_weight κ = {diagnosis.positive_weight}. In the denominator of the exact "
        f"objective the positive counts κ N / n = {diagnosis.positive_mass:.4g}, each of the N negatives 1."
    )


def _embed(encoder: nn.Module, views: Tensor) -> Tensor:
    images = views.flatten(0, 1).to(next(encoder.parameters()).device)
    return F.normalize(encoder(images), dim=1).view(len(views), 2, -1)
