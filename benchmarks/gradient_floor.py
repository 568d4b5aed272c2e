"""Descend on free embeddings with each estimator and follow the squared norm of the exact gradient.

    python benchmarks/gradient_floor.py [--batch-sizes 2 4 16]

64 samples of two fixed views, a linear encoder, β = 5, plain SGD with step sizes falling like 1/√t. Where an
estimator's gradient is biased, the exact gradient stays away from zero however long one descends.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, SogCLRLoss
from torch_emc2.diagnostics import clustered_embeddings
from torch_emc2.exact import global_contrastive_loss
from torch_emc2.losses import ContrastiveLoss

TEMPERATURE = 0.2
SAMPLES = 64


def exact(inputs: Tensor, net: torch.nn.Module) -> tuple[float, float]:
    """Return the global loss, and the squared norm of its gradient at the parameters."""
    net.zero_grad()
    loss = global_contrastive_loss(net(inputs), TEMPERATURE)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    return loss.item(), sum(float(g.square().sum()) for g in gradients)


def descend(loss_fn: ContrastiveLoss, batch_size: int, steps: int, seed: int) -> list[tuple[int, float, float]]:
    """Return (step, loss, squared norm), averaged over the last tenth at each mark."""
    torch.manual_seed(seed)
    inputs = clustered_embeddings(SAMPLES, 16, clusters=8, view_spread=1.0)
    net = torch.nn.Linear(16, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    marks = {steps // 64, steps // 16, steps // 4, steps}
    points, order = [], torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.randperm(SAMPLES)
        index, order = order[:batch_size], order[batch_size:]
        optimizer.param_groups[0]["lr"] = 0.3 / step**0.5
        optimizer.zero_grad()
        z = net(inputs)
        ids = torch.stack([2 * index, 2 * index + 1], 1)

        def encode(carried: Tensor, z: Tensor = z) -> Tensor:
            both = isinstance(loss_fn, EMC2Loss) and loss_fn.kernel == "isir"  # which carries both views of a sample
            return z[carried // 2] if both else z[carried // 2, carried % 2]

        loss_fn(z[index, 0], z[index, 1], ids, encode=encode).backward()
        optimizer.step()
        if step in marks:
            points.append((step, *exact(inputs, net)))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 16])
    parser.add_argument("--epochs", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    ids = 2 * SAMPLES
    makers: dict[str, Callable[[int], ContrastiveLoss]] = {
        "InfoNCE": lambda seed: InfoNCELoss(TEMPERATURE),
        "DCL": lambda seed: DCLLoss(TEMPERATURE),
        "SogCLR, γ = 0.9": lambda seed: SogCLRLoss(ids, TEMPERATURE, 0.9),
        "EMC²": lambda seed: EMC2Loss(ids, TEMPERATURE, carry="encode", burn_in=0.0, seed=seed),
        "EMC², isir": lambda seed: EMC2Loss(ids, TEMPERATURE, carry="encode", kernel="isir", seed=seed),
    }
    for batch_size in args.batch_sizes:
        steps = args.epochs * SAMPLES // batch_size
        marks = [steps // 64, steps // 16, steps // 4, steps]
        print(f"\n| b = {batch_size} | " + " | ".join(f"step {mark}" for mark in marks) + " | loss |")
        print("|---|" + "--:|" * (len(marks) + 1))
        for name, make in makers.items():
            runs = torch.tensor([descend(make(seed), batch_size, steps, seed) for seed in range(args.seeds)])
            mean, std = runs.mean(0), runs.std(0)
            norms = " | ".join(f"{m:.1e} ± {s:.0e}" for m, s in zip(mean[:, 2], std[:, 2], strict=True))
            print(f"| {name} | {norms} | {mean[-1, 1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
