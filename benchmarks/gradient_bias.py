"""Print how wrong each estimator's gradient is at fixed embeddings, as Markdown tables.

    python benchmarks/gradient_bias.py [--batch-sizes 32]

500 samples in 15 clusters, β = 14.28: two fixed views a sample, and two that each visit draws anew from eight. All
variants in the registry, and other libraries' losses that are installed (peers.py). Relative to the squared norm of the
exact global gradient: the squared error of one epoch's mean gradient, and the squared bias that no averaging removes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peers import peers

from torch_emc2.diagnostics import clustered_embeddings, gradient_error
from torch_emc2.losses.registry import ESTIMATORS, Given, variants

TEMPERATURE = 0.07

FURTHER = {  # settings of EMC² that are measured here alone
    "EMC², encode, no burn-in": {"burn_in": 0.0},
    "EMC², encode, no burn-in, 4 chains": {"burn_in": 0.0, "num_chains": 4},
    "EMC², isir, 8 chains": {"kernel": "isir", "num_chains": 8},
}


def makers(given: Given, num_samples: int) -> dict[str, Callable[[int], Any]]:
    further = {title: ESTIMATORS["emc2"].maker(fields, given) for title, fields in FURTHER.items()}
    return {**variants(given), **further, **peers(num_samples, TEMPERATURE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--runs", type=int, default=6)
    args = parser.parse_args()

    z, anew = clustered_embeddings(), clustered_embeddings(views=8)
    m, _, dim = z.shape
    by_view, by_sample = (makers(Given(n * m, TEMPERATURE, dim, n), m) for n in (2, 1))
    tables = (
        ("fixed views, an id a view", z, "view", by_view),
        ("fixed views, an id a sample", z, "sample", by_sample),
        ("views drawn anew", anew, "sample", by_sample),
    )
    print(f"torch {torch.__version__}; {args.runs} runs of {args.epochs} epochs after 20 of mixing")
    for batch_size in args.batch_sizes:
        for title, embeddings, ids, estimators in tables:
            print(f"\n| b = {batch_size}, {title} | one epoch's squared error | squared bias ± s.e. |\n|---|--:|--:|")
            for name, make_loss in estimators.items():
                error = gradient_error(make_loss, embeddings, batch_size, ids=ids, epochs=args.epochs, runs=args.runs)
                print(
                    f"| {name} | {error.one_epoch:.3f} | {error.squared_bias:.4f} ± {error.standard_error:.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
