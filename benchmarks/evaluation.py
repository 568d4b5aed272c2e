"""Time and memory of k-NN beside the bare float32 product, and of the probe beside scikit-learn and torch's L-BFGS.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py

The size is ImageNet-100's, with synthetic features: 8 GB of memory and some twenty minutes. Seconds, with the probe's
fits to their end: --rows 2000 --queries 500 --width 64 --classes 10 --iterations 1000

What is compared takes turns; seconds are medians, of the processor, so that what else the machine does hardly counts;
memory is the largest peak beyond what was there before.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn.functional import cross_entropy

from torch_emc2.evaluation import linear_probe, nearest_neighbours, probe
from torch_emc2.evaluation.probe import L2_GRID, logistic_regression
from torch_emc2.held_out import held_out_fifth


def features(rows: int, width: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw what an encoder's look like: not negative, in classes that overlap, along some directions more."""
    y = torch.randint(classes, (rows,), generator=generator)
    means = 0.15 * torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    x = torch.randn(rows, width, generator=generator).add_(means[y]).mul_(torch.linspace(0, -2, width).exp()).relu_()
    return x, y


def memory() -> int:
    """Bytes of this process that are its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measured(call: Callable[[], Any]) -> tuple[float, int, Any]:
    """Return seconds of the processor, bytes at the peak, and what the call returns."""
    before, done = memory(), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    result = call()
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    return seconds, peak - before, result


def compare(title: str, contenders: dict[str, Callable[[], Any]], turns: int, note: Callable[[Any], str]) -> None:
    """Print a table; ratios are to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks, notes = dict.fromkeys(contenders, 0), dict.fromkeys(contenders, "")
    for _ in range(turns):
        for name, call in contenders.items():
            took, peak, result = measured(call)
            seconds[name].append(took)
            peaks[name], notes[name] = max(peaks[name], peak), note(result)
    first = statistics.median(next(iter(seconds.values())))
    print(f"\n| {title} | CPU seconds | ratio | peak MB | |\n|---|--:|--:|--:|---|")
    for name, took in seconds.items():
        median = statistics.median(took)
        print(f"| {name} | {median:.2f} | {median / first:.2f} | {peaks[name] / 1e6:.0f} | {notes[name]} |", flush=True)


def product(train_x: Tensor, query_x: Tensor) -> None:
    for chunk in query_x.split(512):
        chunk @ train_x.T


def float64(train_x: Tensor, query_x: Tensor, k: int) -> Tensor:
    """Do what k-NN costs by float64 products alone."""
    train = train_x.double()
    half = train.square().sum(dim=1) / 2
    return torch.cat([torch.addmm(-half, chunk.double(), train.T).topk(k).indices for chunk in query_x.split(512)])


def torch_lbfgs(x: Tensor, y: Tensor, l2: float, iterations: int, start: tuple[Tensor, Tensor]) -> None:
    """Fit ``start``, weights and bias, in place."""
    weight, bias = (part.requires_grad_() for part in start)
    optimizer = torch.optim.LBFGS(
        start,
        max_iter=iterations,
        tolerance_grad=1e-5,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, y) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)  # type: ignore[arg-type]


def fits(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, iterations: int, library: str) -> float:
    """Fit at every strength on four fifths, and once more on all rows: the probe's fits, of standardised features."""
    kept = ~held_out_fifth(y, 0)
    fit_x, fit_y = x[kept], y[kept]
    runs = [(fit_x, fit_y, l2) for l2 in L2_GRID] + [(x, y, 1e-2)]
    model = logistic_regression().set_params(max_iter=iterations)
    weights = torch.zeros(int(y.max()) + 1, x.shape[1]), torch.zeros(int(y.max()) + 1)
    for run_x, run_y, l2 in runs:
        if library == "scikit-learn":
            model.set_params(C=1 / (l2 * len(run_x))).fit(run_x.numpy(), run_y.numpy())
        else:
            torch_lbfgs(run_x, run_y, l2, iterations, weights)
    if library == "scikit-learn":
        return float(model.score(test_x.numpy(), test_y.numpy()))
    with torch.no_grad():
        return float((torch.addmm(weights[1], test_x, weights[0].T).argmax(dim=1) == test_y).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=126_000)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=3, help="of L-BFGS at most, in each of the probe's nine fits")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=("knn", "probe"))
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    train_x, train_y = features(args.rows, args.width, args.classes, generator)
    test_x, test_y = features(args.queries, args.width, args.classes, generator)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()};", end=" ")
    print(f"{args.rows} x {args.width} features, {args.queries} queries, {args.classes} classes")
    if args.only != "probe":
        search = partial(nearest_neighbours, train_x, test_x)
        contenders = {
            "float32 product": partial(product, train_x, test_x),
            "Euclidean, k = 1": partial(search, 1),
            "Euclidean, k = 200": partial(search, 200),
            "cosine, k = 200": partial(search, 200, "cosine"),
            "float64 products, k = 200": partial(float64, train_x, test_x, 200),
        }
        compare("k-NN", contenders, args.turns, lambda _: "")
    if args.only != "knn":
        mean, std = train_x.mean(dim=0), train_x.std(dim=0, correction=0)
        scaled = [x.sub(mean).div_(std) for x in (train_x, test_x)]
        alone = partial(fits, scaled[0], train_y, scaled[1], test_y, args.iterations)

        def ours() -> float:
            model = logistic_regression().set_params(max_iter=args.iterations)
            with patch.object(probe, "logistic_regression", lambda: model):
                return linear_probe(train_x, train_y, test_x, test_y).accuracy

        contenders = {
            "scikit-learn alone": partial(alone, "scikit-learn"),
            "linear_probe": ours,
            "torch.optim.LBFGS": partial(alone, "torch"),
        }
        warnings.simplefilter("ignore", ConvergenceWarning)
        compare("nine fits of the probe", contenders, args.turns, lambda accuracy: f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
