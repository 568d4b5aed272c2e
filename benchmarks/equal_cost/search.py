"""A search that is the same for every method: from a cell to a better neighbour, until none is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from cells import Cell

__all__ = ["Found", "search"]


class Found(NamedTuple):
    """How a search ended.

    Attributes:
        cell: the best.
        tried: cells.
        inside: whether all neighbours of the best were tried, so that none is left to extend the grid by.
    """

    cell: Cell
    tried: int
    inside: bool


def search(start: Cell, score: Callable[[Cell], float], *, budget: int, kappas: Sequence[float | str] = ()) -> Found:
    """Try a cell's neighbours in learning rate (times 2) and temperature (times √2), then each κ; go on from a better.

    The grid has no edges.

    Args:
        start: where it begins.
        score: more is better.
        budget: cells that may be tried.
        kappas: that may be chosen; none where κ stays.
    """

    def cell_at(point: Point) -> Cell:
        lr, temperature, kappa = point
        settings = {"lr": start.lr * 2.0**lr, "temperature": start.temperature * 2.0 ** (temperature / 2)}
        rounded: dict[str, float | str] = {name: float(f"{value:.3g}") for name, value in settings.items()}
        return replace(start, **rounded, **({"kappa": kappas[kappa]} if kappas else {}))

    def neighbours(point: Point) -> Iterator[Point]:
        lr, temperature, kappa = point
        yield from ((lr + by, temperature, kappa) for by in (1, -1))
        yield from ((lr, temperature + by, kappa) for by in (1, -1))
        yield from ((lr, temperature, other) for other in range(len(kappas)) if other != kappa)

    best: Point = (0, 0, kappas.index(start.kappa) if start.kappa in kappas else 0)
    scores = {best: score(cell_at(best))}
    while (point := next((each for each in neighbours(best) if each not in scores), None)) is not None:
        if len(scores) == budget:
            return Found(cell_at(best), budget, inside=False)
        scores[point] = score(cell_at(point))
        best = max(best, point, key=scores.__getitem__)
    return Found(cell_at(best), len(scores), inside=True)


Point = tuple[int, int, int]
"""Steps in learning rate and temperature from the start, and which κ."""
