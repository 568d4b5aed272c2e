"""One step on a large batch, plain and in chunks: peak memory, time, and the difference of the gradients.

    python benchmarks/chunked_step.py [--batch-size 4096] [--chunk-sizes 64 256 1024]

Each step runs in a process of its own, which reports its peak resident memory above that before the step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_emc2 import EMC2Loss, cached_backward


class Step(NamedTuple):
    """What a process reports."""

    mebibytes: float
    seconds: float
    loss: float
    gradient: list[float]


def step(batch_size: int, chunk_size: int | None) -> Step:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 128),
    )
    loss_fn = EMC2Loss(batch_size)
    images = torch.rand(batch_size, 3, 32, 32)
    views = (images + 0.1 * torch.randn_like(images), images + 0.1 * torch.randn_like(images))
    index = torch.arange(batch_size)
    loss_fn(*torch.randn(2, batch_size, 128), index)  # the chains are at some state, the walk is compiled
    before, start = _peak(), time.perf_counter()
    loss: Tensor
    if chunk_size is None:
        loss = loss_fn(encoder(views[0]), encoder(views[1]), index)
        loss.backward()
    else:
        loss = cached_backward(loss_fn, encoder, views, index, chunk_size)
    seconds = time.perf_counter() - start
    gradient = torch.cat([parameter.grad.flatten() for parameter in encoder.parameters()])
    return Step(_peak() - before, seconds, loss.item(), gradient.tolist())


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[64, 256, 1024])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, CPU, {torch.get_num_threads()} threads")
    print(f"\n| step, b = {args.batch_size} | peak memory, MiB | seconds | loss | gradient's relative difference |")
    print("|---|--:|--:|--:|--:|")
    plain = None
    for chunk_size in (None, *args.chunk_sizes):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            done = pool.apply(step, (args.batch_size, chunk_size))
        gradient = torch.tensor(done.gradient, dtype=torch.float64)
        plain = gradient if plain is None else plain
        difference = float((gradient - plain).norm() / plain.norm())
        name = "plain" if chunk_size is None else f"chunks of {chunk_size}"
        print(
            f"| {name} | {done.mebibytes:.0f} | {done.seconds:.1f} | {done.loss:.5f} | {difference:.1e} |", flush=True
        )


if __name__ == "__main__":
    main()
