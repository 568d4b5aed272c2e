"""One step on a large batch, plain and in chunks: peak memory, time, and the difference of the gradients.

    python benchmarks/chunked_step.py [--batch-size 4096] [--chunk-sizes 64 256 1024]

Each step runs in a process of its own, which reports its peak resident memory above that before the step. The loss
alone, on embeddings that are there, is what no chunks make smaller.
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


def step(batch_size: int, chunk_size: int | str) -> Step:
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
    EMC2Loss(8, kernel="metropolis")(*torch.randn(2, 8, 128), torch.arange(8))  # compiles the walk
    loss_fn = EMC2Loss(batch_size, kernel="metropolis")
    images = torch.rand(batch_size, 3, 32, 32)
    views = (images + 0.1 * torch.randn_like(images), images + 0.1 * torch.randn_like(images))
    index = torch.arange(batch_size)
    embeddings = torch.randn(2, batch_size, 128, requires_grad=True)
    before, start = _peak(), time.perf_counter()
    loss: Tensor
    if isinstance(chunk_size, int):
        loss = cached_backward(loss_fn, encoder, views, index, chunk_size=chunk_size)
    else:
        loss = loss_fn(*(embeddings if chunk_size == "the loss alone" else map(encoder, views)), index)
        loss.backward()
    seconds, mebibytes = time.perf_counter() - start, _peak() - before
    gradient = [number for p in encoder.parameters() if p.grad is not None for number in p.grad.flatten().tolist()]
    return Step(mebibytes, seconds, loss.item(), gradient)


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
    plain = torch.empty(0)
    for chunk_size in ("plain", *args.chunk_sizes, "the loss alone"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            done = pool.apply(step, (args.batch_size, chunk_size))
        row = f"{chunk_size}" if isinstance(chunk_size, str) else f"chunks of {chunk_size}"
        row = f"| {row} | {done.mebibytes:.0f} | {done.seconds:.1f} "
        if done.gradient:
            gradient = torch.tensor(done.gradient, dtype=torch.float64)
            plain = gradient if chunk_size == "plain" else plain
            row += f"| {done.loss:.5f} | {float((gradient - plain).norm() / plain.norm()):.1e} |"
        print(row if done.gradient else row + "| – | – |", flush=True)


if __name__ == "__main__":
    main()
