"""CPU time of each method's step, measured in turn, so that what else the machine does falls on all of them alike.

    python benchmarks/equal_cost/seconds.py wordnet --packages FOLDER --cells momentum-together:32 dcl-together:128

Ratios are what to compare: the times themselves move with whatever else the machine does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from cells import Cell
from methods import METHODS
from problem import Problem
from problems import PROBLEMS
from tqdm.auto import tqdm
from train import train

__all__ = ["microseconds"]


def microseconds(cells: Sequence[Cell], problem: Problem, *, pairs: int, rounds: int) -> dict[Cell, list[float]]:
    """Return CPU microseconds a pair of the first ``pairs`` of each cell's training, ``rounds`` times, in turn."""
    found: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for number in tqdm(range(1 + rounds), unit="round", disable=None):
        for cell in cells:
            size = cell.batch_size * METHODS[cell.method].batches
            _, cost = train(cell, problem, "cpu", steps=max(2, pairs // size))
            if "diverged" in cost:
                raise RuntimeError(f"{cell.method} at b = {cell.batch_size}: {cost['diverged']}")
            if number:  # at first code is loaded and compiled
                found[cell].append(1e6 * cost["cpu_seconds"] / cost["pairs"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--packages", type=Path, required=True, help="folder of npm's archives")
    parser.add_argument("--cells", nargs="+", required=True, metavar="METHOD:B", help="methods and batch sizes")
    parser.add_argument("--pairs", type=int, default=4096, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem = PROBLEMS[args.problem](args.packages)
    cells = [
        Cell(args.problem, method, int(size), problem.epochs, problem.lr, problem.temperature)
        for method, _, size in (each.rpartition(":") for each in args.cells)
    ]
    print("| | b | µs a pair, median | least | times the first |\n|---|--:|--:|--:|--:|")
    found = microseconds(cells, problem, pairs=args.pairs, rounds=args.rounds)
    first = median(found[cells[0]])
    for cell, each in found.items():
        title = METHODS[cell.method].title
        print(f"| {title} | {cell.batch_size} | {median(each):.0f} | {min(each):.0f} | {median(each) / first:.2f} |")


if __name__ == "__main__":
    main()
