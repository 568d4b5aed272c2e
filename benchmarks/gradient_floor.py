"""Descend with each estimator and see how near to zero the exact gradient comes.

    python benchmarks/gradient_floor.py [--batch-sizes 2 4 16]

64 samples of two fixed views, a linear encoder, β = 5, plain SGD whose step size falls linearly to zero, so that the
noise of single steps averages out. The longer the descent, the less is left of the gradient, but for an estimator's
bias: no descent is long enough for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from torch_emc2.diagnostics import at_rest, clustered_embeddings
from torch_emc2.exact import global_contrastive_loss
from torch_emc2.losses import ContrastiveLoss
from torch_emc2.losses.registry import ESTIMATORS, LossContext
from torch_emc2.settings.losses import EMC2Config

TEMPERATURE = 0.2
SAMPLES = 64
STEP_SIZE = 1.0
DIM = 8


def exact(inputs: Tensor, net: torch.nn.Module) -> tuple[float, float]:
    """Return the global loss, and the squared norm of its gradient at the parameters."""
    net.zero_grad()
    loss = global_contrastive_loss(net(inputs), TEMPERATURE)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    return loss.item(), sum(float(g.square().sum()) for g in gradients)


def descend(loss_fn: ContrastiveLoss, batch_size: int, epochs: int, seed: int) -> tuple[float, float]:
    """Return the exact loss and the squared norm of its gradient at the end."""
    torch.manual_seed(seed)
    inputs = clustered_embeddings(SAMPLES, 16, clusters=8, view_spread=1.0)
    net = torch.nn.Linear(16, DIM)
    optimizer = torch.optim.SGD(net.parameters(), lr=STEP_SIZE)
    steps = epochs * (SAMPLES // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for index in torch.randperm(SAMPLES).split(batch_size):
            z = net(inputs)

            def encode(carried: Tensor, z: Tensor = z) -> Tensor:
                return z[carried // 2, carried % 2]

            optimizer.zero_grad()
            ids = torch.stack([2 * index, 2 * index + 1], 1)
            at_rest(loss_fn)(z[index, 0], z[index, 1], ids, encode=encode).backward()
            optimizer.step()
            schedule.step()
    return exact(inputs, net)


def makers() -> dict[str, Callable[[int], ContrastiveLoss]]:
    """Return what makes each estimator from a seed, by its title; metropolis without burn-in."""
    given = LossContext(2 * SAMPLES, TEMPERATURE, DIM, 2)
    settings = {"emc2": EMC2Config(kernel="metropolis", burn_in=0.0)}
    return {
        method.title: row.maker(method.fields, given, settings.get(row.group))
        for row in ESTIMATORS.values()
        for method in row.methods
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 16])
    parser.add_argument("--epochs", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for batch_size in args.batch_sizes:
        print(f"\n| b = {batch_size} | " + " | ".join(f"{epochs} epochs" for epochs in args.epochs) + " | loss |")
        print("|---|" + "--:|" * (len(args.epochs) + 1))
        for name, make in makers().items():
            runs = torch.tensor(
                [
                    [descend(make(seed), batch_size, epochs, seed) for epochs in args.epochs]
                    for seed in range(args.seeds)
                ]
            )
            mean, std = runs.mean(0), runs.std(0)
            norms = " | ".join(f"{m:.1e} ± {s:.0e}" for m, s in zip(mean[:, 1], std[:, 1], strict=True))
            print(f"| {name} | {norms} | {mean[-1, 0]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
