"""Print the peak memory of one forward and backward pass beyond what the embeddings take, and its seconds.

    python benchmarks/memory.py [--batch-sizes 1024 4096 16384] [--losses InfoNCE DCL]

Each pass is a process of its own, after a small one that loads and compiles. The peak is the process's (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import peers

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, SogCLRLoss

DIM = 128
LOSSES: dict[str, Callable[[int], torch.nn.Module]] = {
    "InfoNCE": lambda n: InfoNCELoss(0.07),
    "DCL": lambda n: DCLLoss(0.07),
    "SogCLR": lambda n: SogCLRLoss(n, 0.07),
    "EMC²": lambda n: EMC2Loss(n, 0.07, kernel="metropolis"),
    "EMC², 4 chains": lambda n: EMC2Loss(n, 0.07, kernel="metropolis", num_chains=4),
    "EMC², isir": lambda n: EMC2Loss(n, 0.07, kernel="isir"),
}
QUADRATIC = "lightly, NTXentLoss"  # as others do: the whole matrix of similarities


def peak() -> float:
    """The most memory this process has had, in MB, since it was last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(name: str, b: int) -> tuple[float, float]:
    """MB and seconds."""
    if name == QUADRATIC:
        loss_fn: Callable[..., torch.Tensor] = peers(b, 0.07)[name](0)
    else:
        loss_fn = LOSSES[name](b)
    x, y = torch.randn(2, b, DIM).unbind()
    x.requires_grad_()
    y.requires_grad_()
    loss_fn(x[:64], y[:64], torch.arange(64)).backward()
    x.grad = y.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = peak(), time.perf_counter()
    loss_fn(x, y, torch.randperm(b)).backward()
    return peak() - before, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--losses", nargs="+", default=[*LOSSES, QUADRATIC])
    parser.add_argument("--most", type=int, default=4096, help="the largest batch for a loss that needs b² memory")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(*measure(args.measure[0], int(args.measure[1])))
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, d = {DIM}: MB beyond the embeddings, seconds\n"
    )
    print("| b | " + " | ".join(args.losses) + " |\n|--:|" + "--:|" * len(args.losses))
    for b in args.batch_sizes:
        cells = []
        for name in args.losses:
            if name == QUADRATIC and b > args.most:
                cells.append("–")
                continue
            command = [sys.executable, __file__, "--measure", name, str(b)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            cells.append("{:.0f} MB, {:.2f} s".format(*map(float, done.stdout.split())) if done.stdout else "failed")
        print(f"| {b} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
