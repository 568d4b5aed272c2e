"""The scan against a plain loop, and the chain against the distribution it is to draw from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_emc2.kernels.metropolis import metropolis_hastings, walk


def loop(log_scores: Tensor, entry_score: Tensor, noise: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """One step after the other, as the algorithm is written down."""
    state = torch.empty(log_scores.shape, dtype=torch.int64)
    score = entry_score.clone()
    for row in range(len(log_scores)):
        at = -1
        for k in range(log_scores.shape[1]):
            if valid[row, k] and log_scores[row, k] + noise[row, k] > score[row]:
                score[row], at = log_scores[row, k], k
            state[row, k] = at
    return state, score


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, n = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 7, 8, 9, 31, 64, 65, 200, 600]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1.0, 14.3, 300.0]))
    log_scores = torch.randn(rows, n, dtype=dtype, generator=generator) * scale
    entry = torch.randn(rows, dtype=dtype, generator=generator) * scale
    if draw(st.booleans()):  # ties between scores, thresholds and entry
        log_scores, entry = log_scores.round(), entry.round()
    noise = torch.empty(rows, n, dtype=dtype).exponential_(generator=generator)
    if draw(st.booleans()):
        noise = noise.round()
    log_scores[torch.rand(rows, n, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))] = -torch.inf
    entry[torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -torch.inf
    valid = torch.rand(rows, n, generator=generator) >= draw(st.sampled_from([0.0, 0.3, 1.0]))
    return log_scores, entry, noise, valid


@settings(max_examples=300, deadline=None)
@given(problems())
def test_scan_equals_loop(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    state, score = loop(*problem)
    result = metropolis_hastings(*problem)
    assert torch.equal(result.state, state)
    assert torch.equal(result.score, score)


def test_scan_equals_loop_at_the_size_of_a_large_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    log_scores = torch.randn(64, 2046, generator=generator) * 3
    noise = torch.empty(64, 2046).exponential_(generator=generator)
    problem = (log_scores, torch.full((64,), -torch.inf), noise, torch.rand(64, 2046, generator=generator) > 0.01)
    assert torch.equal(metropolis_hastings(*problem).state, loop(*problem)[0])


@settings(max_examples=100, deadline=None)
@given(problem=problems(), num_chains=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_walks_count_the_steps_of_the_loop(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], num_chains: int, seed: int
) -> None:
    log_scores, entry, _, valid = problem
    log_scores = log_scores.masked_fill(~valid, -torch.inf)
    generator = torch.Generator().manual_seed(seed)
    burnt = ((log_scores > -torch.inf).sum(1) * torch.rand(len(entry), generator=generator)).long()
    carried_score = entry[:, None] * torch.arange(1, num_chains + 1)
    noise = torch.empty(len(entry), num_chains, log_scores.shape[1], dtype=entry.dtype)
    noise.exponential_(generator=generator)

    result = walk(log_scores, carried_score, noise, burnt)

    steps, carried_steps, all_accepted = torch.zeros_like(log_scores), torch.zeros_like(carried_score), [0] * len(entry)
    for row in range(len(entry)):
        for chain in range(num_chains):
            at, score, step = -1, carried_score[row, chain], 0
            for k in range(log_scores.shape[1]):
                if log_scores[row, k] == -torch.inf:
                    continue
                if log_scores[row, k] + noise[row, chain, k] > score:
                    at, score = k, log_scores[row, k]
                    all_accepted[row] += 1
                counted = step >= burnt[row]
                if at < 0:
                    carried_steps[row, chain] += counted
                else:
                    steps[row, at] += counted
                step += 1
            assert result.state[row, chain] == at
    assert torch.equal(result.steps, steps)
    assert torch.equal(result.carried_steps, carried_steps)
    assert result.accepted.tolist() == all_accepted


def test_walks_take_scores_with_a_gradient() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    carried_score, noise = torch.zeros(2, 1, requires_grad=True), torch.ones(2, 1, 3)
    result = walk(x, carried_score, noise, torch.zeros(2, dtype=torch.int64))
    assert not result.steps.requires_grad
    assert result.steps.tolist() == [[1, 1, 1], [1, 1, 1]]


def chain_over(log_p: Tensor, steps: int, chains: int, seed: int) -> Tensor:
    """States of independent chains of uniform proposals over len(log_p) states, at their last step."""
    generator = torch.Generator().manual_seed(seed)
    proposals = torch.randint(len(log_p), (chains, steps), generator=generator)
    noise = torch.empty(chains, steps, dtype=log_p.dtype).exponential_(generator=generator)
    entry = torch.full((chains,), -torch.inf, dtype=log_p.dtype)
    state = metropolis_hastings(log_p[proposals], entry, noise).state[:, -1:]
    return proposals.gather(1, state)[:, 0]


def test_draws_follow_the_softmax() -> None:
    log_p = torch.tensor([0.0, 1.0, -2.0, 2.0, 0.5], dtype=torch.float64)
    draws = chain_over(log_p, steps=60, chains=20_000, seed=3)
    expected = log_p.softmax(0) * len(draws)
    chi2 = ((torch.bincount(draws, minlength=5) - expected) ** 2 / expected).sum()
    assert chi2 < 18.47  # the 0.999 quantile for 4 degrees of freedom


def test_a_warm_chain_spends_its_steps_by_the_softmax() -> None:
    """Carried from visit to visit, over fixed scores: its occupancy is exact within sampling error."""
    log_p = torch.tensor([1.0, 0.0, 2.5, -1.0, 0.0, 1.5], dtype=torch.float64)
    p, generator = log_p.softmax(0), torch.Generator().manual_seed(11)
    rows, n, visits = 2_000, 24, 12
    ids, score = torch.full((rows,), -1), torch.full((rows,), -torch.inf, dtype=torch.float64)
    occupancy = torch.zeros(rows, len(p), dtype=torch.float64)
    for visit in range(visits):
        proposals = torch.randint(len(p), (rows, n), generator=generator)
        noise = torch.empty(rows, n, dtype=torch.float64).exponential_(generator=generator)
        state, score = metropolis_hastings(log_p[proposals], score, noise)
        at = torch.where(state < 0, ids[:, None], proposals.gather(1, state.clamp(min=0)))
        ids = at[:, -1]
        if visit >= 2:  # warmed up
            occupancy += torch.nn.functional.one_hot(at, len(p)).sum(1)
    occupancy /= occupancy.sum(1, keepdim=True)
    mean, error = occupancy.mean(0), occupancy.std(0) / math.sqrt(rows)
    assert ((mean - p).abs() < 4 * error).all()
    assert 0.5 * (mean - p).abs().sum() < 0.5 * 3 * error.sum()
    assert error.max() < 0.005


def test_total_variation_keeps_below_the_spectral_bound() -> None:
    # An independence chain with uniform proposals has second eigenvalue exactly 1 - 1 / (N max p) (Liu 1996).
    log_p = torch.tensor([3.0, 0.0, 0.0, 1.0, -1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    p, n = log_p.softmax(0), len(log_p)
    accept = (log_p[None] - log_p[:, None]).exp().clamp(max=1) / n
    matrix = accept - accept.diag().diag()
    matrix += (1 - matrix.sum(1)).diag()
    eigenvalue = 1 - 1 / (n * p.max())
    second = torch.linalg.eigvals(matrix).real.sort(descending=True).values[1]
    assert second.item() == pytest.approx(eigenvalue.item(), abs=1e-12)

    chains = 40_000
    for steps in (1, 2, 4, 8, 16):
        draws = chain_over(
            log_p, steps + 1, chains, seed=steps
        )  # the first proposal is always accepted: a uniform start
        empirical = torch.bincount(draws, minlength=n).double() / chains
        exact = torch.full((n,), 1 / n, dtype=torch.float64) @ torch.linalg.matrix_power(matrix, steps)
        assert 0.5 * (exact - p).abs().sum() <= eigenvalue**steps
        assert 0.5 * (empirical - exact).abs().sum() < 3 * 0.5 * math.sqrt(n / chains)  # sampling error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_scores": torch.zeros(3)}, r"\(rows, N\)"),
        ({"log_scores": torch.zeros(2, 0), "noise": torch.zeros(2, 0)}, "N >= 1"),
        ({"entry_score": torch.zeros(3)}, r"entry_score must be \(2,\)"),
        ({"noise": torch.zeros(2, 4)}, r"noise must be \(2, 3\)"),
        ({"valid": torch.ones(2, 1, dtype=torch.bool)}, r"valid must be \(2, 3\)"),
        ({"valid": torch.ones(2, 3)}, "valid must be bool"),
        ({"noise": torch.zeros(2, 3, dtype=torch.float64)}, "share one dtype"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], message: str) -> None:
    good = {"log_scores": torch.zeros(2, 3), "entry_score": torch.zeros(2), "noise": torch.zeros(2, 3)}
    with pytest.raises((ValueError, TypeError), match=message):
        metropolis_hastings(**(good | change))
