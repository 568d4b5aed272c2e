"""Bias and variance of estimators' gradients at the parameters of two towers, along a training on WordNet.

    python benchmarks/equal_cost/why.py --packages FOLDER

The exact gradient is that of the global loss with κ = 0 of 1,024 training pairs, of two towers or, where all embeddings
are negatives, of all those; errors are relative to its squared norm. The encoders are those of a training on all pairs.
It takes 3 GB of memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import Cell
from problem import Problem
from problems import PROBLEMS
from table import markdown
from torch import Tensor
from towers import Tower
from tqdm.auto import tqdm
from train import train

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, SogCLRLoss, UniformityLoss
from torch_emc2.diagnostics import GradientError, gradient_error, parameter_gradient, two_tower_error

TRAINED = Cell("wordnet", "dcl-together", 32, epochs=3, lr=2e-3, temperature=0.03)  # the best of its search
PAIRS = 1024
LENGTHS = {"epochs": 16, "mixing_epochs": 16, "runs": 3}


def emc2(carry: str, **settings: Any) -> Callable[..., Any]:
    """Make EMC² of a seed, with the settings that all losses here have."""
    return lambda seed, **common: EMC2Loss(carry=carry, seed=seed, **settings, **common)


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "InfoNCE": lambda seed, num_samples, **common: InfoNCELoss(**common),
    "DCL": lambda seed, num_samples, **common: DCLLoss(**common),
    "Uniformity": lambda seed, num_samples, **common: UniformityLoss(**common),
    "SogCLR, γ = 0.9": lambda seed, **common: SogCLRLoss(gamma=0.9, **common),
    "EMC², cache": emc2("cache"),
    "EMC², cache, 4 chains": emc2("cache", num_chains=4),
    "EMC², cache, 512 remembered": emc2("cache", num_remembered=512),
    "EMC², encode": emc2("encode"),
    "EMC², encode, 4 chains": emc2("encode", num_chains=4),
}


def some_pairs(x: Tower, y: Tower) -> Tensor:
    """Choose training pairs of which no two share an item."""
    seen: tuple[set[int], set[int]] = set(), set()
    chosen: list[int] = []
    for row in torch.randperm(len(x.pairs), generator=torch.Generator().manual_seed(0)).tolist():
        own = int(x.ids[row]), int(y.ids[row])
        if not any(item in side for item, side in zip(own, seen, strict=True)):
            chosen.append(row)
            for item, side in zip(own, seen, strict=True):
                side.add(item)
        if len(chosen) == PAIRS:
            return torch.tensor(chosen)
    raise ValueError(f"only {len(chosen)} of {PAIRS} pairs share no item")


def measure(x: Tower, y: Tower, temperature: float, batch_size: int) -> dict[tuple[str, str], GradientError]:
    """Return the errors at the parameters, by the set of negatives and the estimator."""
    pairs = some_pairs(x, y)
    for tower in (x, y):
        tower.encoder.bag.sparse = False  # type: ignore[union-attr]  # gradients are compared as a whole
    parameters = [parameter for tower in (x, y) for parameter in tower.encoder.parameters()]

    def embed(ids: Tensor) -> Tensor:
        return torch.stack([x(pairs[ids]), y(pairs[ids])], 1)

    with torch.no_grad():
        z = embed(torch.arange(PAIRS))
    to_parameters = parameter_gradient(embed, parameters, PAIRS, chunk_size=PAIRS)
    lengths: dict[str, Any] = {**LENGTHS, "to_parameters": to_parameters}
    two = {"num_samples": (PAIRS, PAIRS), "temperature": temperature, "towers": 2}
    alike = {"num_samples": 2 * PAIRS, "temperature": temperature}
    of_two, of_all = {}, {}
    for name, make in tqdm(ESTIMATORS.items(), f"b = {batch_size}", leave=False):
        errors = two_tower_error(partial(make, **two), *z.unbind(1), temperature, batch_size, **lengths)
        of_two["two towers", name] = errors.at_parameters
        error = gradient_error(partial(make, **alike), z, temperature, batch_size, **lengths)
        of_all["all embeddings", name] = error.at_parameters
    return {key: error for key, error in (of_two | of_all).items() if error is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of npm's archives")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--points", type=float, nargs="+", default=[0.0, 0.1, 1.0], help="shares of the training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem: Problem = PROBLEMS[TRAINED.problem](args.packages)
    total = int(TRAINED.epochs * (len(problem.parts["train"]) // TRAINED.batch_size))
    for point in args.points:
        steps = round(point * total)
        (x, y), _ = train(TRAINED, problem, "cpu", steps)
        errors = {b: measure(x, y, TRAINED.temperature, b) for b in args.batch_sizes}
        print(f"\nAfter {steps} of {total} steps: an epoch's squared error; squared bias ± standard error\n")
        header = ["negatives", "estimator", *(f"b = {b}" for b in args.batch_sizes)]
        rows = [[*key, *(_shown(errors[b][key]) for b in args.batch_sizes)] for key in next(iter(errors.values()))]
        print(markdown(header, rows), flush=True)


def _shown(error: GradientError) -> str:
    return f"{error.one_epoch:.3f}; {error.squared_bias:.3f} ± {error.standard_error:.3f}"


if __name__ == "__main__":
    main()
