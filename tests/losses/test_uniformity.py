"""UniformityLoss against plain loops: value of its parts, gradient, memory, and what it averages to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing import spawn
from torch.nn.functional import normalize

from torch_emc2 import DCLLoss, InfoNCELoss, Temperature, UniformityLoss

B, D = 5, 4


def batches(count: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 2, B, D, dtype=torch.float64, generator=generator)
    return [(x.requires_grad_(), y.requires_grad_()) for x, y in drawn]


def log_u(loss_fn: UniformityLoss) -> Tensor:
    """Logarithm of the average, of each direction."""
    return torch.stack([side.numbers[0] for side in loss_fn.sides])


def dot(u: Tensor, v: Tensor) -> float:
    return sum(a * b for a, b in zip(u.tolist(), v.tolist(), strict=True))


def sets(x: Tensor, y: Tensor, towers: int) -> list[list[tuple[int, int, list[int]]]]:
    """Of each direction its rows: row, positive, negatives, as places among x and then y."""
    if towers == 2:
        return [
            [(i, B + i, [B + j for j in range(B) if j != i]) for i in range(B)],
            [(B + i, i, [j for j in range(B) if j != i]) for i in range(B)],
        ]
    places = range(2 * B)
    return [[(i, (i + B) % (2 * B), [j for j in places if j % B != i % B]) for i in places]]


def by_loop(
    x: Tensor, y: Tensor, u: list[float], call: int, beta: float, gamma: float, towers: int, kappa: float
) -> Tensor:
    """The gradient as that of a sum of similarities with constant weights; ``u`` is written over. Calls from 0 on."""
    z, gamma = normalize(torch.cat([x, y])), gamma if call else 1.0
    total, directions = z.new_zeros(()), sets(x, y, towers)
    for side, rows in enumerate(directions):
        means = []
        for row, positive, negatives in rows:
            mass = kappa * math.exp(beta * dot(z[row], z[positive]))
            g = (sum(math.exp(beta * dot(z[row], z[j])) for j in negatives) + mass) / len(negatives)
            own = (1 - gamma) * u[side] + gamma * g
            weights = {j: math.exp(beta * dot(z[row], z[j])) / (len(negatives) * own) for j in negatives}
            weights[positive] = mass / (len(negatives) * own) - 1
            total = total + beta * sum(w * (z[row] @ z[j]) for j, w in weights.items()) / len(rows) / len(directions)
            means.append(g)
        mean = sum(means) / len(means)
        u[side] = (1 - gamma) * u[side] + gamma * mean
    return total


@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("towers", [1, 2])
def test_steps_are_those_of_a_loop_also_over_a_save(towers: Any, gamma: float, kappa: float) -> None:
    loss_fn = UniformityLoss(0.4, gamma=gamma, towers=towers, positive_weight=kappa)
    u = [0.0] * towers
    for step, (x, y) in enumerate(batches(6)):
        got = torch.autograd.grad(loss_fn(x, y), (x, y))
        expected = torch.autograd.grad(by_loop(x, y, u, step, 2.5, gamma, towers, kappa), (x, y))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)  # u is kept in float32
        if step == 1:
            saved = loss_fn.state_dict()
            loss_fn = UniformityLoss(0.4, gamma=gamma, towers=towers, positive_weight=kappa)
            loss_fn.load_state_dict(saved)
    torch.testing.assert_close(log_u(loss_fn).exp(), torch.tensor(u, dtype=torch.float32))


@given(st.floats(0.05, 2.0), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_with_gamma_one_it_is_dcl(temperature: float, seed: int) -> None:
    loss_fn, dcl = UniformityLoss(temperature, gamma=1.0), DCLLoss(temperature)
    for x, y in batches(2, seed=seed):
        got, expected = loss_fn(x, y), dcl(x, y)
        torch.testing.assert_close(got + math.log(2 * B - 2), expected)
        torch.testing.assert_close(torch.autograd.grad(got, (x, y)), torch.autograd.grad(expected, (x, y)))


def test_over_many_small_batches_it_is_the_gradient_of_alignment_and_uniformity_of_the_whole_data() -> None:
    """Two towers of 40 pairs, embeddings at rest: batches of 4, and the logarithm of one mean over all pairs."""
    m, beta = 40, 5.0
    x, y = torch.randn(2, m, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    x, y = x.requires_grad_(), y.requires_grad_()
    logits = beta * normalize(x) @ normalize(y).T
    negatives = logits.masked_fill(torch.eye(m, dtype=torch.bool), -torch.inf).flatten().logsumexp(0)
    objective = negatives - math.log(m * (m - 1)) - logits.diagonal().mean()
    exact = torch.cat(torch.autograd.grad(objective, (x, y)))

    def mean_gradient(loss_fn: Any) -> Tensor:
        generator, total = torch.Generator().manual_seed(1), torch.zeros_like(exact)
        for epoch in range(420):
            for index in torch.randperm(m, generator=generator).split(4):
                gradient = torch.cat(torch.autograd.grad(loss_fn(x[index], y[index]), (x, y)))
                total += gradient * (epoch >= 20) / (400 * m / 4)
        return total

    def error(loss_fn: Any) -> float:
        return float((mean_gradient(loss_fn) - exact).square().sum() / exact.square().sum())

    assert error(UniformityLoss(1 / beta, gamma=0.01, towers=2)) < 0.002
    assert error(UniformityLoss(1 / beta, gamma=1.0, towers=2)) > 0.02, "DCL's is another objective's, and biased"


def test_a_row_without_negatives_changes_nothing() -> None:
    x, y = batches(1)[0]
    same = torch.zeros(B, B, dtype=torch.bool)
    same[0] = True  # x_0 knows of no negative; all else does
    settings: Any = {"towers": 2, "directions": "x->y", "positive_weight": 0.5}
    loss_fn, infonce = UniformityLoss(0.4, gamma=0.5, **settings), InfoNCELoss(0.4, **settings)
    value = loss_fn(x, y, same=same)
    got = torch.autograd.grad(value, (x, y))
    expected = torch.autograd.grad(infonce(x, y, same=same), (x, y))
    torch.testing.assert_close(got, expected)  # the first call normalises each row
    z, w = normalize(x), normalize(y)
    masses = [[math.exp(2.5 * dot(z[i], w[j])) * (0.5 if i == j else 1) for j in range(B)] for i in range(1, B)]
    others = [sum(row) / (B - 1) for row in masses]
    assert log_u(loss_fn)[0].exp().item() == pytest.approx(sum(others) / len(others), rel=1e-5)
    values = [math.log(other) - 2.5 * dot(z[i], w[i]) for i, other in enumerate(others, 1)]
    assert value.item() == pytest.approx(sum(values) / B)  # the row's own is 0
    nobody = UniformityLoss(0.4, **settings)
    nobody(x, y, same=torch.ones(B, B, dtype=torch.bool))
    assert (float(nobody.last["normaliser_ratio"]), float(log_u(nobody)[0])) == (0, -math.inf)
    nobody(x, y)
    before = nobody.sides[0].numbers
    nobody(x, y, same=torch.ones(B, B, dtype=torch.bool))
    assert torch.equal(nobody.sides[0].numbers, before)


def test_evaluation_reads_and_does_not_write() -> None:
    (a, b), (c, d) = batches(2)
    loss_fn = UniformityLoss(0.4)
    loss_fn(a, b)
    before = loss_fn.get_extra_state()
    loss_fn.eval().temperature = 0.3
    loss_fn(c, d)
    assert torch.equal(loss_fn.get_extra_state()["average"], before["average"])


@pytest.mark.parametrize("way", ["schedule", "learnt", "states"])
def test_the_average_follows_the_temperature(way: str) -> None:
    """Embeddings at rest, β from 4 to 16 in 400 calls: the average is that of β at the end. It would lag by .7 else."""
    m = 40
    x, y = torch.randn(2, m, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    first = Temperature(0.25).double() if way == "learnt" else 0.25
    loss_fn, generator = UniformityLoss(first, towers=2, directions="x->y"), torch.Generator().manual_seed(1)
    for call in range(400):
        beta = 4 * 4 ** (call / 399)
        if isinstance(loss_fn.temperature, Temperature):
            with torch.no_grad():
                loss_fn.temperature.logit_scale.fill_(math.log(beta))
        elif way == "schedule":
            loss_fn.temperature = 1 / beta
        else:
            state, loss_fn = loss_fn.state_dict(), UniformityLoss(1 / beta, towers=2, directions="x->y")
            loss_fn.load_state_dict(state)
        index = torch.randperm(m, generator=generator)[:8]
        loss_fn(x[index], y[index])
    masses = [
        math.exp(16 * dot(a, b)) for i, a in enumerate(normalize(x)) for j, b in enumerate(normalize(y)) if i != j
    ]
    assert log_u(loss_fn)[0].item() == pytest.approx(math.log(sum(masses) / len(masses)), abs=0.1)


@given(st.floats(0.02, 2.0), st.floats(0.02, 2.0))
@settings(max_examples=20, deadline=None)
def test_after_a_leap_of_the_temperature_the_batch_alone_counts(before: float, after: float) -> None:
    (a, b), (c, d), (e, f) = batches(3)
    loss_fn, dcl = UniformityLoss(before), DCLLoss(after)
    for x, y in ((a, b), (c, d)):
        loss_fn(x, y)
    loss_fn.temperature = after
    if abs(math.log(before / after)) > 0.1001:
        got, expected = (torch.autograd.grad(each(e, f), (e, f)) for each in (loss_fn, dcl))
        torch.testing.assert_close(got, expected)


def test_averages_that_are_loaded_in_inference_mode_can_be_trained_on() -> None:
    (a, b), (c, d), (e, f) = batches(3)
    first, second = UniformityLoss(0.4), UniformityLoss(0.4)
    first(a, b)
    with torch.inference_mode():
        second.load_state_dict(first.state_dict())
    for x, y in ((c, d), (e, f)):
        assert torch.equal(first(x, y), second(x, y))
    assert torch.equal(log_u(first), log_u(second))


def test_a_temperature_that_stays_moves_nothing() -> None:
    loss_fn, (x, y) = UniformityLoss(0.01, gamma=1e-4), batches(1)[0]  # of float64, which float32 rounds
    for _ in range(300):
        loss_fn(x, y)
    assert float(loss_fn.last["normaliser_ratio"]) == pytest.approx(1, abs=1e-5)


def test_its_number_tells_how_far_the_average_is_from_the_batch() -> None:
    loss_fn = UniformityLoss(0.4, towers=2)
    (a, b), (c, d) = batches(2)
    loss_fn(a, b)
    before = log_u(loss_fn).exp()
    loss_fn(c, d)
    means = [
        sum(math.exp(2.5 * dot(z[row], z[j])) for row, _, negatives in rows for j in negatives) / (B * (B - 1))
        for z in [normalize(torch.cat([c, d]))]
        for rows in sets(c, d, 2)
    ]
    expected = sum(float(u) / mean for u, mean in zip(before, means, strict=True)) / 2
    assert float(loss_fn.last["normaliser_ratio"]) == pytest.approx(expected, rel=1e-5)


def test_what_it_cannot_use_is_named() -> None:
    for gamma in (0.0, 1.5, math.nan, "0.1", True):
        with pytest.raises(ValueError, match=r"gamma must be a number in \(0, 1\], got"):
            UniformityLoss(gamma=gamma)  # type: ignore[arg-type]
    loss_fn, (x, y) = UniformityLoss(), batches(1)[0]
    loss_fn.gamma = math.nan
    with pytest.raises(ValueError, match=r"gamma must be a number in \(0, 1\], got nan"):
        loss_fn(x, y)
    good = UniformityLoss().get_extra_state()
    for change, named in (
        ({"average": torch.zeros(2)}, "the saved average is damaged: it needs three numbers"),
        ({"average": torch.tensor([math.nan, 0, 0])}, "the saved average is damaged"),
        ({"average": torch.tensor([0.0, 0, math.inf])}, "the saved average is damaged"),
        ({"average": torch.tensor([0.0, -math.inf, 2])}, "the saved average is damaged"),
        ({"average": torch.tensor([0.0, 50, 2])}, "the saved average is damaged"),
        ({"average": torch.zeros(3, dtype=torch.int64)}, "it needs three numbers, float32"),
        ({"calls": -1}, "the saved state is damaged: it is of -1 calls"),
        ({"calls": "1"}, "the saved state has '1' for a number"),
        ({"more": 1}, "load what such a loss has saved"),
    ):
        with pytest.raises(ValueError, match=named):
            UniformityLoss().set_extra_state(good | change)
    for state in ({}, DCLLoss().state_dict()):
        with pytest.raises(ValueError, match="load what such a loss has saved"):
            UniformityLoss().set_extra_state(dict(state))


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    loss_fn, gradients = UniformityLoss(0.4, gamma=0.3, towers=2), []
    share = slice(0, 2) if rank == 0 else slice(2, B)
    for x, y in batches(3):
        x, y = x.detach()[share].requires_grad_(), y.detach()[share].requires_grad_()
        gradients.append(torch.cat(torch.autograd.grad(loss_fn(x, y), (x, y)), 1) / 2)  # DDP's mean over ranks
    torch.save((gradients, loss_fn.state_dict()), f"{folder}/{rank}.pt")
    state = loss_fn.get_extra_state()
    state["x"]["average"] += torch.tensor([rank, 0, 0])
    loss_fn.set_extra_state(state)
    with pytest.raises(ValueError, match="checksum of what was loaded"):  # not each rank with its own
        loss_fn(x, y)
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    spawn(_rank, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    loss_fn = UniformityLoss(0.4, gamma=0.3, towers=2)
    expected = [torch.cat(torch.autograd.grad(loss_fn(x, y), (x, y)), 1) for x, y in batches(3)]
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    got = [torch.cat(parts) for parts in zip(*(gradients for gradients, _ in of_ranks), strict=True)]
    torch.testing.assert_close(got, expected)
    for _, state in of_ranks:
        torch.testing.assert_close(state, loss_fn.state_dict())
