"""Print how the time of a loss step grows with the batch, the data, the dimension and the chains.

    python benchmarks/scaling.py [--seconds 5]

One is varied, the others are b = 256, m = 10⁵, d = 128 and one chain. Losses and sizes take turns, and medians are
fitted by time = c · size^exponent.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_emc2 import EMC2Loss, InfoNCELoss

SIZES = {"b": (128, 256, 512, 1024), "m": (10**4, 10**5, 10**6), "d": (32, 64, 128, 256, 512), "chains": (1, 2, 4, 8)}
GIVEN = {"b": 256, "m": 10**5, "d": 128, "chains": 1}
LOSSES: dict[str, Callable[[int, int], torch.nn.Module]] = {
    "InfoNCE": lambda m, chains: InfoNCELoss(0.07),
    "EMC²": lambda m, chains: EMC2Loss(m, 0.07, kernel="metropolis", num_chains=chains),
    "EMC², isir": lambda m, chains: EMC2Loss(m, 0.07, kernel="isir", num_chains=chains),
}


def step(loss_fn: torch.nn.Module, b: int, m: int, d: int) -> float:
    x, y = (z.requires_grad_() for z in torch.randn(2, b, d).unbind())
    index = torch.randint(m // b, (b,)) * b + torch.arange(b)  # all different, for any m
    start = time.perf_counter()
    loss_fn(x, y, index).backward()
    return time.perf_counter() - start


def exponent(sizes: Sequence[int], seconds: list[float]) -> float:
    """The slope of a line through the logarithms."""
    logs = torch.tensor([sizes, seconds], dtype=torch.float64).log()
    logs -= logs.mean(1, keepdim=True)
    return float((logs[0] * logs[1]).sum() / (logs[0] ** 2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each thing that is varied")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| varied | loss | ms | exponent |\n|---|---|---|--:|")
    for varied, sizes in SIZES.items():
        cases: list[tuple[str, dict[str, Any]]] = [(name, {**GIVEN, varied: size}) for name in LOSSES for size in sizes]
        made = [LOSSES[name](case["m"], case["chains"]) for name, case in cases]
        times: list[list[float]] = [[] for _ in cases]
        start = time.perf_counter()
        while len(times[0]) < 4 or time.perf_counter() - start < args.seconds:
            for loss_fn, (_, case), seconds in zip(made, cases, times, strict=True):
                seconds.append(step(loss_fn, case["b"], case["m"], case["d"]))
        medians = [statistics.median(seconds[1:]) for seconds in times]
        for number, name in enumerate(LOSSES):
            own = medians[number * len(sizes) :][: len(sizes)]
            shown = ", ".join(f"{size}: {1e3 * seconds:.1f}" for size, seconds in zip(sizes, own, strict=True))
            print(f"| {varied} | {name} | {shown} | {exponent(sizes, own):.2f} |", flush=True)


if __name__ == "__main__":
    main()
