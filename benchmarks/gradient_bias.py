"""Print how wrong each estimator's gradient is at fixed embeddings, as Markdown tables.

    python benchmarks/gradient_bias.py [--batch-sizes 32]

500 samples in 15 clusters, β = 14.28: two fixed views a sample, and two that each visit draws anew from eight. Relative
to the squared norm of the exact global gradient: the squared error of one epoch's mean gradient, and the squared bias
that no averaging removes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss
from torch_emc2.diagnostics import clustered_embeddings, gradient_error
from torch_emc2.losses import ContrastiveLoss
from torch_emc2.kernels import Metropolis

TEMPERATURE = 0.07


def emc2(ids: int, **settings: Any) -> Callable[[int], ContrastiveLoss]:
    return lambda seed: EMC2Loss(ids, TEMPERATURE, seed=seed, **{"carry": "encode", **settings})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--runs", type=int, default=6)
    args = parser.parse_args()

    z, anew = clustered_embeddings(), clustered_embeddings(views=8)
    m, _, dim = z.shape
    fixed_views: dict[str, tuple[Callable[[int], ContrastiveLoss], str]] = {
        "InfoNCE": (lambda seed: InfoNCELoss(TEMPERATURE), "view"),
        "DCL": (lambda seed: DCLLoss(TEMPERATURE), "view"),
        "SogCLR, γ = 0.9": (lambda seed: SogCLRLoss(2 * m, TEMPERATURE, 0.9), "view"),
        "SogCLR, γ = 0.1": (lambda seed: SogCLRLoss(2 * m, TEMPERATURE, 0.1), "view"),
        "Negative Cache": (lambda seed: NegativeCacheLoss(2 * m, dim, TEMPERATURE, seed=seed), "view"),
        "EMC², a chain a view, encode": (emc2(2 * m), "view"),
        "EMC², the same, 4 chains": (emc2(2 * m, num_chains=4), "view"),
        "EMC², a chain a view, encode, no burn-in": (emc2(2 * m, kernel=Metropolis(0.0)), "view"),
        "EMC², the same, no burn-in, 4 chains": (emc2(2 * m, kernel=Metropolis(0.0), num_chains=4), "view"),
        "EMC², a chain a view, encode_if_used": (emc2(2 * m, carry="encode_if_used"), "view"),
        "EMC², a chain a view, cache": (emc2(2 * m, carry="cache"), "view"),
        "EMC², a chain a view, drop": (emc2(2 * m, carry="drop"), "view"),
        "EMC², a chain a sample, encode": (emc2(m), "sample"),
        "EMC², a chain a sample, cache": (emc2(m, carry="cache"), "sample"),
        "EMC², a chain a sample, drop": (emc2(m, carry="drop"), "sample"),
        "EMC², isir, a chain a view, encode": (emc2(2 * m, kernel="isir"), "view"),
        "EMC², isir, the same, 4 chains": (emc2(2 * m, kernel="isir", num_chains=4), "view"),
        "EMC², isir, the same, 8 chains": (emc2(2 * m, kernel="isir", num_chains=8), "view"),
        "EMC², isir, a chain a view, cache": (emc2(2 * m, carry="cache", kernel="isir"), "view"),
        "EMC², isir, a chain a sample, encode": (emc2(m, kernel="isir"), "sample"),
    }
    views_anew = {
        "InfoNCE": fixed_views["InfoNCE"],
        "DCL": fixed_views["DCL"],
        "SogCLR, γ = 0.9": (lambda seed: SogCLRLoss(m, TEMPERATURE, 0.9), "sample"),
        "SogCLR, γ = 0.1": (lambda seed: SogCLRLoss(m, TEMPERATURE, 0.1), "sample"),
        "EMC², encode": (emc2(m), "sample"),
        "EMC², encode, 4 chains": (emc2(m, num_chains=4), "sample"),
        "EMC², cache": (emc2(m, carry="cache"), "sample"),
        "EMC², drop": (emc2(m, carry="drop"), "sample"),
        "EMC², isir, encode": (emc2(m, kernel="isir"), "sample"),
        "EMC², isir, encode, 4 chains": (emc2(m, kernel="isir", num_chains=4), "sample"),
        "EMC², isir, cache": (emc2(m, carry="cache", kernel="isir"), "sample"),
    }
    print(f"torch {torch.__version__}; {args.runs} runs of {args.epochs} epochs after 20 of mixing")
    for batch_size in args.batch_sizes:
        for title, embeddings, estimators in (("fixed views", z, fixed_views), ("views drawn anew", anew, views_anew)):
            print(f"\n| b = {batch_size}, {title} | one epoch's squared error | squared bias ± s.e. |\n|---|--:|--:|")
            for name, (make_loss, ids) in estimators.items():
                error = gradient_error(make_loss, embeddings, batch_size, ids=ids, epochs=args.epochs, runs=args.runs)  # type: ignore[arg-type]
                print(
                    f"| {name} | {error.one_epoch:.3f} | {error.squared_bias:.4f} ± {error.standard_error:.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
