"""Print how fast each estimator's error falls as gradients are averaged over epochs, and rank the carry policies.

    python benchmarks/gradient_averaging.py [--batch-sizes 32]

The problem of gradient_bias.py: 500 samples of two fixed views in 15 clusters, β = 14.28. An unbiased estimator whose
epochs are independent falls as the row 1 / n; a biased one stops at its squared bias. What lies above variance / n +
bias is memory: a chain's visits are not independent.
"""

from __future__ import annotations

import argparse

import torch

from torch_emc2.diagnostics import clustered_embeddings, gradient_error
from torch_emc2.diagnostics.markdown import error_table
from torch_emc2.losses.registry import LossContext, variants

TEMPERATURE = 0.07
POLICIES = ("encode", "encode_if_used", "cache", "drop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--epochs", type=int, default=128)
    parser.add_argument("--runs", type=int, default=6)
    args = parser.parse_args()

    z = clustered_embeddings()
    print(f"torch {torch.__version__}; {args.runs} runs of {args.epochs} epochs after 20 of mixing")
    for batch_size in args.batch_sizes:
        errors = {
            name: gradient_error(make_loss, z, TEMPERATURE, batch_size, epochs=args.epochs, runs=args.runs)
            for name, make_loss in variants(LossContext(2 * len(z), TEMPERATURE, z.shape[2], 2)).items()
        }
        print(f"\nb = {batch_size}\n\n{error_table(errors)}", flush=True)
        for title, epochs in (("one epoch", 0), (f"{args.epochs} epochs", -1)):
            by_policy = {policy: errors[f"EMC², {policy}"].squared_error[epochs] for policy in POLICIES}
            ranked = sorted(by_policy, key=by_policy.__getitem__)
            print(f"Carry policies by the error of {title}: {' < '.join(f'{p} {by_policy[p]:.4f}' for p in ranked)}")


if __name__ == "__main__":
    main()
