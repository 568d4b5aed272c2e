"""What every kernel keeps to: those of `KERNELS`, and the one that docs/kernels.md gives to copy.

Invariance is of one move of many rows. Their sets are the same ids, behind which each row has the states in an order of
its own: states 2 i and 2 i + 1 are a sample's views, a batch is three of four samples, and a set has a view of each.
"""

import math
import re
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_emc2.kernels import EMPTY, KERNELS, Kernel, Visit

PAGE = Path(__file__).parents[2] / "docs/kernels.md"


def run_page() -> dict[str, Any]:
    """Run the page's code, block after block; return the names it leaves."""
    names: dict[str, Any] = {"__name__": __name__}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, PAGE, "exec"), names)
    return names


EVERY: dict[str, Kernel] = {**{name: kind() for name, kind in KERNELS.items()}, "of the page": run_page()["Sampled"]()}


class Exponentials:
    """Draws for ``rows`` from a seed."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(seed)

    def exponential(self, *shape: int) -> Tensor:
        return torch.empty(self.rows, *shape, dtype=torch.float64).exponential_(generator=self.generator)


@st.composite
def visits(draw: st.DrawFn) -> Visit:
    """Chains that carry what is in a set, what is the row's alone, what is in none, or nothing."""
    rows, chains, sets = 5, draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shared, own = draw(st.integers(1, 6)), draw(st.integers(0, 2))
    scale, with_positive = draw(st.sampled_from([0.0, 1.0, 14.3, 300.0])), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    columns = torch.arange(sets * shared).view(sets, shared)
    scores = scale * torch.randn(rows, sets * shared + own, dtype=torch.float64, generator=generator)
    no_proposal = torch.rand(rows, sets, shared, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    no_proposal[:, :, 0] = False
    scores[:, : sets * shared][no_proposal.flatten(1)] = -torch.inf
    column_ids = torch.randperm(sets * shared, generator=generator)
    private_ids = 100 + torch.arange(rows * own).view(rows, own)

    carried_ids = torch.full((rows, chains), EMPTY)
    carried_score = torch.full((rows, chains), -torch.inf, dtype=torch.float64)
    if with_positive:
        scores[:, columns[:, 0]] = scores[:, :1].clone()
        carried_score[:] = scores[:, :1]
    kinds = torch.randint(4, (rows, chains), generator=generator)
    for row in range(rows):
        for chain in range(chains):
            s, k = (int(torch.randint(size, (), generator=generator)) for size in (sets, shared + own))
            if kinds[row, chain] == 0:
                carried_ids[row, chain] = 900 + chain
                carried_score[row, chain] = scale * torch.randn((), generator=generator)
                continue
            column = s * shared + k if k < shared else sets * shared + k - shared
            if 0 < kinds[row, chain] < 3 and k >= with_positive and scores[row, column] > -torch.inf:
                carried_ids[row, chain] = column_ids[column] if k < shared else private_ids[row, k - shared]
                carried_score[row, chain] = scores[row, column]
    keep_in = torch.randint(sets, (rows, chains), generator=generator)
    everywhere = sets * shared + torch.arange(own).expand(sets, -1)
    in_sets = torch.cat([columns, everywhere], 1)[:, torch.randperm(shared + own, generator=generator)]
    return Visit(scores, in_sets, carried_score, keep_in, carried_ids, column_ids, private_ids if own else None)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=50, deadline=None)
@given(visit=visits(), seed=st.integers(0, 2**31))
def test_a_move_keeps_to_the_contract(name: str, visit: Visit, seed: int) -> None:
    kernel, (rows, columns) = EVERY[name], visit.logits.shape
    before = {field: value.clone() for field, value in vars(visit).items() if value is not None}
    move = kernel.move(visit, Exponentials(rows, seed))
    for field, value in before.items():
        assert torch.equal(getattr(visit, field), value), field

    assert move.weights.shape == visit.logits.shape
    assert move.carried_weights.shape == move.state.shape == visit.carried_score.shape
    assert move.acceptance.shape == (rows,)
    assert ((move.acceptance >= 0) & (move.acceptance <= 1 + 1e-12)).all()
    for row in range(rows):
        weights, carried_weights = move.weights[row].tolist(), move.carried_weights[row].tolist()
        assert min(weights + carried_weights) >= 0
        assert sum(weights) + sum(carried_weights) / len(carried_weights) == pytest.approx(1, abs=1e-12)
        for weight, score in zip(weights, visit.logits[row].tolist(), strict=True):
            assert weight == 0 or score > -torch.inf
        for chain, weight in enumerate(carried_weights):
            state = int(move.state[row, chain])
            assert -1 <= state < columns
            if state >= 0:
                assert visit.logits[row, state] > -torch.inf
            if visit.carried_score[row, chain] == -torch.inf:
                assert state >= 0
                assert weight == 0

    again = kernel.move(visit, Exponentials(rows, seed))
    assert all(torch.equal(first, second) for first, second in zip(move, again, strict=True))


STATES, SETS, SET_SIZE = 8, 2, 3
SCORE = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, 0.2], dtype=torch.float64)
TARGET = SCORE.softmax(0)


def walked() -> tuple[Tensor, Tensor]:
    """The law in which Metropolis–Hastings ends that starts at the target, and that of the steps that count.

    Its proposals, without replacement, are not independent of where it is: one step after the other, over all orders.
    """
    ends, counted = torch.zeros(2, STATES, dtype=torch.float64).unbind()
    places = permutations(range(STATES // 2), SET_SIZE), product(range(2), repeat=SET_SIZE)
    orders = [[2 * sample + view for sample, view in zip(*each, strict=True)] for each in product(*places)]
    score = SCORE.tolist()
    for order in orders:
        law = TARGET.tolist()
        for step, proposal in enumerate(order):
            for state in range(STATES):
                if state != proposal:
                    moved = law[state] * min(1.0, math.exp(score[proposal] - score[state]))
                    law[state] -= moved
                    law[proposal] += moved
            if step >= 1:  # one of three steps is burnt
                counted += torch.tensor(law, dtype=torch.float64) / 2
        ends += torch.tensor(law, dtype=torch.float64)
    return ends / len(orders), counted / len(orders)


BIASED: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], float, float]] = {"metropolis": (walked, 0.0220, 0.0164)}
"""Kernels with a bias: the exact laws of ends and of weights, and their distances (total variation) from the target."""


@pytest.mark.parametrize("name", EVERY)
def test_the_softmax_is_invariant(name: str) -> None:
    rows, chains = 20_000, 2
    generator = torch.Generator().manual_seed(5)
    samples = torch.rand(rows, STATES // 2, generator=generator).argsort(1)
    first = 2 * samples + torch.randint(2, samples.shape, generator=generator)
    state_of = torch.cat(
        [first[:, :SET_SIZE], first[:, :SET_SIZE] ^ 1, first[:, SET_SIZE:], first[:, SET_SIZE:] ^ 1], 1
    )
    start = torch.multinomial(TARGET.expand(rows, -1), chains, replacement=True, generator=generator)
    carried_ids = state_of.argsort(1).gather(1, start)
    column_ids = torch.arange(SETS * SET_SIZE)
    proposed = state_of[:, column_ids]
    keep_in = torch.randint(SETS, (rows, chains), generator=generator)
    sets = column_ids.view(SETS, SET_SIZE)
    visit = Visit(SCORE[proposed], sets, SCORE[start], keep_in, carried_ids, column_ids)
    move = EVERY[name].move(visit, Exponentials(rows, 6))

    end = torch.where(move.state < 0, start, proposed.gather(1, move.state.clamp(min=0)))
    ends = torch.nn.functional.one_hot(end, STATES).double().mean(1)  # (rows, states)
    weights = torch.zeros_like(ends).scatter_add_(1, proposed, move.weights)
    weights.scatter_add_(1, start, move.carried_weights / chains)

    laws = TARGET, TARGET
    if name in BIASED:
        exact, *distances = BIASED[name]
        laws = exact()
        assert [float((law - TARGET).abs().sum() / 2) for law in laws] == pytest.approx(distances, abs=5e-5)
    for sampled, law in zip((ends, weights), laws, strict=True):
        error = sampled.std(0) / rows**0.5
        assert ((sampled.mean(0) - law).abs() < 4 * error).all()
        assert error.max() < 0.004
