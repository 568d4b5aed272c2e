"""Print how wrong each estimator's gradient is at fixed embeddings, as a Markdown table.

    python benchmarks/gradient_bias.py [--batch-sizes 32]

500 samples of two fixed views in 15 clusters, β = 14.28. Relative to the squared norm of the exact global gradient:
the squared error of one epoch's mean gradient, and the squared bias that no averaging removes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss
from torch_emc2.diagnostics import clustered_embeddings, gradient_error
from torch_emc2.losses import ContrastiveLoss

TEMPERATURE = 0.07


def emc2(ids: int, **settings: Any) -> Callable[[int], ContrastiveLoss]:
    return lambda seed: EMC2Loss(ids, TEMPERATURE, seed=seed, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--runs", type=int, default=6)
    args = parser.parse_args()

    z = clustered_embeddings()
    m, _, dim = z.shape
    estimators: dict[str, tuple[Callable[[int], ContrastiveLoss], str]] = {
        "InfoNCE": (lambda seed: InfoNCELoss(TEMPERATURE), "view"),
        "DCL": (lambda seed: DCLLoss(TEMPERATURE), "view"),
        "SogCLR, γ = 0.9": (lambda seed: SogCLRLoss(2 * m, TEMPERATURE, 0.9), "view"),
        "SogCLR, γ = 0.1": (lambda seed: SogCLRLoss(2 * m, TEMPERATURE, 0.1), "view"),
        "Negative Cache": (lambda seed: NegativeCacheLoss(2 * m, dim, TEMPERATURE, seed=seed), "view"),
        "EMC², a chain a view, encode": (emc2(2 * m, carry="encode"), "view"),
        "EMC², a chain a view, encode, 4 chains": (emc2(2 * m, carry="encode", num_chains=4), "view"),
        "EMC², a chain a view, encode, no burn-in": (emc2(2 * m, carry="encode", burn_in=0.0), "view"),
        "EMC², the same, 4 chains": (emc2(2 * m, carry="encode", burn_in=0.0, num_chains=4), "view"),
        "EMC², a chain a view, encode_if_used": (emc2(2 * m, carry="encode_if_used"), "view"),
        "EMC², a chain a view, cache": (emc2(2 * m, carry="cache"), "view"),
        "EMC², a chain a view, drop": (emc2(2 * m, carry="drop"), "view"),
        "EMC², a chain a sample, encode": (emc2(m, carry="encode"), "sample"),
        "EMC², a chain a sample, cache": (emc2(m, carry="cache"), "sample"),
        "EMC², a chain a sample, drop": (emc2(m, carry="drop"), "sample"),
        "EMC², isir, a chain a view": (emc2(2 * m, carry="encode", kernel="isir"), "view"),
        "EMC², isir, a chain a view, cache": (emc2(2 * m, carry="cache", kernel="isir"), "view"),
        "EMC², isir, a chain a view, both views carried": (emc2(2 * m, carry="encode", kernel="isir"), "both"),
        "EMC², isir, the same, 4 chains": (emc2(2 * m, carry="encode", kernel="isir", num_chains=4), "both"),
        "EMC², isir, the same, 8 chains": (emc2(2 * m, carry="encode", kernel="isir", num_chains=8), "both"),
    }
    print(f"torch {torch.__version__}; {args.runs} runs of {args.epochs} epochs after 20 of mixing")
    for batch_size in args.batch_sizes:
        print(f"\n| b = {batch_size} | one epoch's squared error | squared bias ± s.e. |\n|---|--:|--:|")
        for name, (make_loss, ids) in estimators.items():
            error = gradient_error(make_loss, z, batch_size, ids=ids, epochs=args.epochs, runs=args.runs)  # type: ignore[arg-type]
            print(
                f"| {name} | {error.one_epoch:.3f} | {error.squared_bias:.4f} ± {error.standard_error:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
