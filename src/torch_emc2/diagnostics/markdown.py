"""A diagnosis as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from torch_emc2.diagnostics.estimators import Diagnosis
from torch_emc2.diagnostics.gradient import GradientError

__all__ = ["error_table", "to_markdown"]


def error_table(errors: Mapping[str, GradientError]) -> str:
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
