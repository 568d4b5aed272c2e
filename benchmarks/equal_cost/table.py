"""Print tables of what `run.py` has kept, and draw its figure.

    python benchmarks/equal_cost/table.py cells/wordnet.jsonl                          # all methods at each batch size
    python benchmarks/equal_cost/table.py cells/wordnet.jsonl --methods infonce dcl --by-batch-size
    python benchmarks/equal_cost/table.py cells/wordnet.jsonl --within isir-encode 32  # the best at its cost
    python benchmarks/equal_cost/table.py cells/wordnet.jsonl --methods infonce dcl dcl-together --plot equal-cost.png

Numbers are means ± standard deviations over seeds, of test queries; κ's are of the validation queries of the search.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cells import Cell, Kept, Result
from methods import KAPPAS, METHODS

__all__ = ["Group", "by_batch_size", "by_kappa", "costs", "groups", "searched", "within"]

Runs = dict[Cell, Result]


class Group(NamedTuple):
    """Runs that differ in their seeds alone.

    Attributes:
        cell: what they have in common.
        results: one a seed.
    """

    cell: Cell
    results: list[Result]

    def values(self, of: Callable[[Result], float]) -> list[float]:
        return [of(result) for result in self.results]

    def mean(self, of: Callable[[Result], float]) -> float:
        return statistics.fmean(self.values(of))

    def shown(self, of: Callable[[Result], float], digits: int = 2) -> str:
        """Mean ± standard deviation; of a single run no spread."""
        values = self.values(of)
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"


def passes(result: Result) -> float:
    """Encoder passes: one forward and backward is 1, of which the forward is a third."""
    return (result["encoded"] + 2 * result["differentiated"]) / 3


def mrr(result: Result) -> float:
    return result["test"]["MRR"] if "test" in result else 0.0


costs: dict[str, Callable[[Result], float]] = {
    "samples": lambda result: result["pairs"],
    "encoder passes": passes,
    "seconds": lambda result: result["least_seconds"],
    "memory": lambda result: result["peak_mb"],
}


def groups(kept: Runs) -> list[Group]:
    """Gather the final runs: of each method, batch size and number of epochs, the settings that its search found best.

    Of several without a search they are those that were tried last.

    A shared machine is slower at times: seconds are those of the fastest run of a method at its batch size, on the
    hardware that most runs were on.
    """
    ((hardware, _),) = Counter(result.get("hardware") for result in kept.values()).most_common(1) or [(None, 0)]
    rates: dict[tuple[str, int], float] = {}
    for cell, result in kept.items():
        if "pairs" in result and result.get("hardware") == hardware:
            of = cell.method, cell.batch_size
            rates[of] = min(rates.get(of, math.inf), result["cpu_seconds"] / result["pairs"])
    found: dict[Cell, list[Result]] = defaultdict(list)
    for cell, result in kept.items():
        if cell.final:
            pairs = result.get("pairs", 0)
            least = rates.get((cell.method, cell.batch_size), math.inf) * pairs
            found[replace(cell, seed=0)].append({**result, "least_seconds": least})
    order = list(METHODS)

    def in_search(group: Group) -> float:
        own = kept.get(replace(group.cell, seed=0, final=False), {})
        return own.get("validation", {}).get("MRR", 0.0)

    best: dict[tuple[str, int, float], Group] = {}
    for cell, results in found.items():
        of, group = (cell.method, cell.batch_size, cell.epochs), Group(cell, results)
        if of not in best or in_search(group) >= in_search(best[of]):
            best[of] = group
    return sorted(best.values(), key=lambda each: (each.cell.batch_size, order.index(each.cell.method)))


def within(found: Sequence[Group], reference: Group, cost: Callable[[Result], float]) -> dict[str, Group]:
    """Return each method's best group of those that cost no more than another, or 5 percent."""
    limit = 1.05 * reference.mean(cost)
    best: dict[str, Group] = {}
    for group in found:
        method = group.cell.method
        if "diverged" in group.results[0] or group.mean(cost) > limit:
            continue
        if method not in best or group.mean(mrr) > best[method].mean(mrr):
            best[method] = group
    return best


def by_kappa(kept: Runs) -> dict[tuple[str, int], dict[float | str, float]]:
    """Return the best validation MRR of a method and batch size at each κ that was tried."""
    found: dict[tuple[str, int], dict[float | str, float]] = defaultdict(dict)
    for cell, result in kept.items():
        if not cell.final and cell.kappa is not None and "validation" in result:
            own = found[cell.method, cell.batch_size]
            own[cell.kappa] = max(own.get(cell.kappa, 0.0), result["validation"]["MRR"])
    return dict(found)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _all(found: Sequence[Group]) -> str:
    header = ["method", "b", "epochs", "lr", "τ", "κ", "R@1", "R@10", "MRR", "MRR in training", "global loss"]
    header += ["passes a pair", "CPU seconds", "MB", "runs"]
    rows = []
    for group in found:
        cell = group.cell
        row = [METHODS[cell.method].title, str(cell.batch_size), f"{cell.epochs:g}", f"{cell.lr:g}"]
        row += [f"{cell.temperature:g}", "–" if cell.kappa is None else str(cell.kappa)]
        if any("test" not in result for result in group.results):
            rows.append([*row, "diverged", *[""] * 7, str(len(group.results))])
            continue
        row += [group.shown(lambda result, name=name: result["test"][name]) for name in ("R@1", "R@10", "MRR")]
        row += [
            group.shown(lambda result: result["train"]["MRR"], 1),
            group.shown(lambda result: result["global_loss"]),
        ]
        row += [f"{group.mean(lambda result: passes(result) / result['pairs']):.2f}"]
        seconds = group.mean(costs["seconds"])
        row += [f"{seconds:.0f}" if seconds < math.inf else "–"]  # they were on other hardware
        row += [f"{group.mean(costs['memory']):.0f}", str(len(group.results))]
        rows.append(row)
    return markdown(header, rows)


def by_batch_size(found: Sequence[Group], digits: int = 2) -> str:
    """Show test MRR, a row a method and a column a batch size, of the fewest epochs; of several the best is bold."""
    least = min(group.cell.epochs for group in found)
    entries = {(group.cell.method, group.cell.batch_size): group for group in found if group.cell.epochs == least}
    most = max(len(group.results) for group in entries.values())
    at = {size: [group.mean(mrr) for (_, own), group in entries.items() if own == size] for _, size in entries}
    best = {size: max(means) for size, means in at.items() if len(means) > 1}

    def entry(group: Group) -> str:
        shown, runs = group.shown(mrr, digits), len(group.results)
        bold = f"**{shown}**" if group.mean(mrr) == best.get(group.cell.batch_size) else shown
        return bold + (f" ({runs})" if runs < most else "")

    return _methods_by_size({of: entry(group) for of, group in entries.items()})


def searched(kept: Runs) -> str:
    """Show the cells tried, and the best's learning rate and temperature; … if a neighbour in these was not tried."""
    least = min(cell.epochs for cell in kept)
    tried: dict[tuple[str, int], Runs] = defaultdict(dict)
    for cell, result in kept.items():
        if not cell.final and cell.epochs == least:
            tried[cell.method, cell.batch_size][cell] = result

    def entry(runs: Runs) -> str:
        best = max(runs, key=lambda cell: runs[cell].get("validation", {}).get("MRR", 0.0))
        ended = all(any(_alike(cell, near) for cell in runs) for near in _neighbours(best))
        kappa = "" if best.kappa is None else f", κ = {best.kappa}"
        return f"{len(runs)}: {best.lr:g}, {best.temperature:g}{kappa}" + ("" if ended else " …")

    return _methods_by_size({of: entry(runs) for of, runs in tried.items()})


def _methods_by_size(entries: dict[tuple[str, int], str]) -> str:
    sizes = sorted({size for _, size in entries})
    methods = [name for name in METHODS if any(method == name for method, _ in entries)]
    header = ["", *("b = " * (size == sizes[0]) + str(size) for size in sizes)]
    return markdown(
        header, [[METHODS[name].title, *(entries.get((name, size), "–") for size in sizes)] for name in methods]
    )


def _neighbours(cell: Cell) -> list[Cell]:
    """Return those that a search would try in learning rate and temperature."""
    rates = [replace(cell, lr=cell.lr * by) for by in (2, 0.5)]
    return rates + [replace(cell, temperature=cell.temperature * 2**by) for by in (0.5, -0.5)]


def _alike(cell: Cell, other: Cell) -> bool:
    """Tell whether two are at one place of a grid, whose numbers have three digits."""
    close = partial(math.isclose, rel_tol=0.02)
    return close(cell.lr, other.lr) and close(cell.temperature, other.temperature) and cell.kappa == other.kappa


def _within(found: Sequence[Group], reference: Group) -> str:
    best = {name: within(found, reference, cost) for name, cost in costs.items()}

    def entry(group: Group | None) -> str:
        return f"{group.shown(mrr)} (b = {group.cell.batch_size}, {group.cell.epochs:g} epochs)" if group else "–"

    methods = [name for name in METHODS if any(name in each for each in best.values())]
    rows = [[METHODS[name].title, *(entry(each.get(name)) for each in best.values())] for name in methods]
    return markdown(["method", *(f"equal {name}" for name in best)], rows)


def _kappas(kept: Runs) -> str:
    rows = [
        [METHODS[method].title, str(batch_size), *(f"{own[kappa]:.2f}" if kappa in own else "–" for kappa in KAPPAS)]
        for (method, batch_size), own in sorted(by_kappa(kept).items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    return markdown(["method", "b", *(f"κ = {kappa}" for kappa in KAPPAS)], rows)


def plot(found: Sequence[Group], path: Path) -> None:
    """Draw quality against batch size, and against quality in training, of the fewest epochs; mean and deviation."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    least = min(group.cell.epochs for group in found)
    found = [group for group in found if group.cell.epochs == least]
    methods = [name for name in METHODS if any(group.cell.method == name for group in found)]
    for i, name in enumerate(methods):
        own = [group for group in found if group.cell.method == name]
        sizes = [group.cell.batch_size for group in own]
        means = [group.mean(mrr) for group in own]
        spreads = [statistics.stdev(group.values(mrr)) if len(group.results) > 1 else 0 for group in own]
        style = {"label": METHODS[name].title, "color": f"C{i % 10}", "marker": "os^DvP"[i % 6], "capsize": 2}
        left.errorbar(sizes, means, spreads, **style)
        training = [group.mean(lambda result: result["train"]["MRR"]) for group in own]
        right.errorbar(training, means, spreads, **style, ls=":")
        for end in sorted({0, len(own) - 1}):  # those between would cover one another
            place, text = (training[end], means[end]), f"b = {sizes[end]}"
            right.annotate(text, place, (6, -9), textcoords="offset points", fontsize=7, color=style["color"])
    left.set(xlabel="Batch size", ylabel="MRR of test queries, %", xscale="log")
    left.set_xticks(sizes := sorted({group.cell.batch_size for group in found}), [str(size) for size in sizes])
    left.minorticks_off()
    right.set(xlabel="MRR of training queries, %")
    right.margins(x=0.15)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--within", nargs=2, metavar=("METHOD", "B"), help="whose cost is the limit")
    parser.add_argument("--epochs", type=float, help="of that; the fewest")
    parser.add_argument("--by-batch-size", action="store_true", help="MRR and searches, a column a batch size")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args()
    kept = {cell: result for cell, result in Kept(args.cells).results.items() if cell.method in args.methods}
    found = groups(kept)
    if not found:
        parser.error(f"{args.cells} has no final runs")
    if args.by_batch_size:
        print(f"{by_batch_size(found)}\n\nCells tried, and the best: learning rate, τ.\n\n{searched(kept)}")
        return
    print(_all(found))
    print(f"\nMRR of validation queries by κ, the best of the search:\n\n{_kappas(kept)}")
    if args.within:
        method, size = args.within
        own = [group for group in found if (group.cell.method, str(group.cell.batch_size)) == (method, size)]
        own = [group for group in own if args.epochs in (None, group.cell.epochs)]
        if not own:
            parser.error(f"no final runs of {method} at b = {size}")
        reference = min(own, key=lambda group: group.cell.epochs)
        print(f"\nMRR at no more than the cost of {METHODS[method].title}, b = {size}:\n\n{_within(found, reference)}")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
