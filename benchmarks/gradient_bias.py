"""Print how wrong each estimator's gradient is at fixed embeddings, as Markdown tables.

    python benchmarks/gradient_bias.py [--parts towers] [--batch-sizes 32] [--out rows.json]

500 samples in 15 clusters, β = 14.28. Parts: ``fixed``, two fixed views a sample, with an id each; ``shared``, the same
with an id a sample; ``anew``, two that each visit draws from eight; ``towers``, queries against keys and back, with the
gradients in both and in β; ``positive``, the positive in the denominator with weight κ, in one tower and in two,
against the exact objective of the same κ. Relative to the squared norm of the exact gradient: the squared error of one
epoch's mean gradient, and the squared bias that no averaging removes. With ``--out`` a run that was cut off goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import peers

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss
from torch_emc2.diagnostics import (
    GradientError,
    MakeLoss,
    clustered_embeddings,
    clustered_pairs,
    gradient_error,
    two_tower_error,
)
from torch_emc2.exact import objective_mass
from torch_emc2.losses.registry import ESTIMATORS, LossContext, variants

TEMPERATURE = 0.07
SAMPLES, DIM = 500, 32
VIEWS = 2 * SAMPLES

FURTHER = {  # settings of EMC² that are measured here alone
    "EMC², encode, no burn-in": {"kernel": "metropolis", "burn_in": 0.0},
    "EMC², encode, no burn-in, 4 chains": {"kernel": "metropolis", "burn_in": 0.0, "num_chains": 4},
    "EMC², isir, 8 chains": {"kernel": "isir", "num_chains": 8},
}

Errors = tuple[GradientError, ...]
Part = dict[str, Callable[[int, dict[str, int]], Errors]]
"""Rows by name: each measures at a batch size, given epochs, mixing_epochs and runs."""


def emc2(ids: int, **settings: Any) -> MakeLoss:
    return lambda seed: EMC2Loss(ids, TEMPERATURE, seed=seed, **{"kernel": "metropolis", "carry": "encode", **settings})


def one_tower(make_loss: MakeLoss, z: torch.Tensor, ids: Any, mass: float, b: int, lengths: dict[str, int]) -> Errors:
    return (gradient_error(make_loss, z, TEMPERATURE, b, ids=ids, positive_mass=mass, **lengths),)


def two_towers(make_loss: MakeLoss, mass: float, b: int, lengths: dict[str, int]) -> Errors:
    errors = two_tower_error(make_loss, *clustered_pairs(SAMPLES, DIM), TEMPERATURE, b, positive_mass=mass, **lengths)
    return errors.x, errors.y, errors.beta


def measured(embeddings: torch.Tensor, ids: Any, given: LossContext) -> Part:
    """All variants in the registry, those that are measured here alone, and other libraries' losses."""
    further = {title: ESTIMATORS["emc2"].maker(fields, given) for title, fields in FURTHER.items()}
    makers = {**variants(given), **further, **peers(SAMPLES, TEMPERATURE)}
    return {
        name: lambda b, lengths, make=make: one_tower(make, embeddings, ids, 0.0, b, lengths)
        for name, make in makers.items()
    }


def fixed() -> Part:
    return measured(clustered_embeddings(SAMPLES, DIM), "view", LossContext(VIEWS, TEMPERATURE, DIM, 2))


def shared() -> Part:
    return measured(clustered_embeddings(SAMPLES, DIM), "sample", LossContext(SAMPLES, TEMPERATURE, DIM))


def anew() -> Part:
    return measured(clustered_embeddings(SAMPLES, DIM, views=8), "sample", LossContext(SAMPLES, TEMPERATURE, DIM))


def towers() -> Part:
    makers: dict[str, MakeLoss] = {
        "InfoNCE": lambda _: InfoNCELoss(TEMPERATURE, towers=2),
        "DCL": lambda _: DCLLoss(TEMPERATURE, towers=2),
        "SogCLR, γ = 0.9": lambda _: SogCLRLoss(SAMPLES, TEMPERATURE, 0.9, towers=2),
        "SogCLR, γ = 0.1": lambda _: SogCLRLoss(SAMPLES, TEMPERATURE, 0.1, towers=2),
        "Negative Cache": lambda seed: NegativeCacheLoss(SAMPLES, DIM, TEMPERATURE, seed=seed, towers=2),
    }
    for kernel in ("metropolis", "isir"):
        for carry in ("encode", "cache"):
            for chains in (1, 4):
                name = f"EMC², {kernel}, {carry}" + (f", {chains} chains" if chains > 1 else "")
                makers[name] = emc2(SAMPLES, kernel=kernel, carry=carry, num_chains=chains, towers=2)
        makers[f"EMC², {kernel}, drop"] = emc2(SAMPLES, kernel=kernel, carry="drop", towers=2)
    return {name: lambda b, lengths, make=make: two_towers(make, 0.0, b, lengths) for name, make in makers.items()}


def positive() -> Part:
    z = clustered_embeddings(SAMPLES, DIM)
    part: Part = {}
    for tower_count, ids in ((1, VIEWS), (2, SAMPLES)):
        for kappa in (1.0, "global"):
            shared: dict[str, Any] = {"positive_weight": kappa, "towers": tower_count}
            makers: dict[str, MakeLoss] = {
                "InfoNCE": lambda _, ids=ids, shared=shared: InfoNCELoss(TEMPERATURE, num_samples=ids, **shared),
                "EMC², metropolis, encode": emc2(ids, **shared),
                "EMC², isir, encode": emc2(ids, kernel="isir", **shared),
            }
            for name, make in makers.items():

                def measure(b, lengths, make=make, towers=tower_count, kappa=kappa):  # type: ignore[no-untyped-def]
                    mass = objective_mass(kappa, SAMPLES, b)
                    if towers == 2:
                        return two_towers(make, mass, b, lengths)
                    return one_tower(make, z, "view", mass, b, lengths)

                part[f"{('one tower', 'two towers')[tower_count - 1]}, κ = {kappa}: {name}"] = measure
    return part


PARTS = {"fixed": fixed, "shared": shared, "anew": anew, "towers": towers, "positive": positive}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--mixing-epochs", type=int, default=20)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--out", type=Path, help="rows that are done, of the same settings")
    args = parser.parse_args()

    lengths = {"epochs": args.epochs, "mixing_epochs": args.mixing_epochs, "runs": args.runs}
    done = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    print(f"torch {torch.__version__}; {args.runs} runs of {args.epochs} epochs after {args.mixing_epochs} of mixing")
    for b in args.batch_sizes:
        for part in args.parts:
            what = {"towers": "x, y, β", "positive": "z, or x, y, β"}.get(part, "z")
            print(f"\n| b = {b}, {part}: {what} | one epoch's squared error | squared bias ± s.e. |\n|---|--:|--:|")
            for name, measure in PARTS[part]().items():
                key = f"{part}, b = {b}, {lengths}: {name}"
                if key not in done:
                    errors = measure(b, lengths)
                    one_epoch = ", ".join(f"{error.one_epoch:.3f}" for error in errors)
                    bias = ", ".join(f"{error.squared_bias:.4f} ± {error.standard_error:.4f}" for error in errors)
                    done[key] = f"| {name} | {one_epoch} | {bias} |"
                    if args.out:
                        args.out.write_text(json.dumps(done, ensure_ascii=False, indent=1))
                print(done[key], flush=True)


if __name__ == "__main__":
    main()
