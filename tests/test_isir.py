"""The kernel's probabilities by enumeration, its invariance to twelve digits, and its choices by their frequencies."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_emc2.isir import resample


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), scale=st.sampled_from([0.0, 1.0, 300.0]), empty=st.booleans())
def test_weights_are_the_softmax_over_proposals_and_carried(seed: int, n: int, scale: float, empty: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(4, n, dtype=torch.float64, generator=generator)
    carried = scale * torch.randn(4, 3, dtype=torch.float64, generator=generator)
    x[:, 1:][torch.rand(4, n - 1, generator=generator) < 0.3] = -torch.inf
    if empty:
        carried[torch.rand(4, 3, generator=generator) < 0.5] = -torch.inf
    result = resample(x, carried, torch.rand(4, 3, dtype=torch.float64, generator=generator))
    per_chain = torch.stack([torch.cat([x, carried[:, [c]]], 1).softmax(1) for c in range(3)])
    torch.testing.assert_close(result.weights, per_chain[:, :, :n].mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.carried_weights, per_chain[:, :, n].T, rtol=1e-9, atol=1e-12)


def test_states_are_chosen_with_these_weights() -> None:
    draws = 100_000
    x = torch.tensor([[0.3, -torch.inf, 1.2, -0.5]]).expand(draws, 4)
    carried = torch.tensor([[0.8]]).expand(draws, 1)
    uniform = 1 - torch.rand(draws, 1, generator=torch.Generator().manual_seed(0))
    state = resample(x, carried, uniform).state[:, 0]
    expected = torch.cat([carried[:1], x[:1]], 1).softmax(1)[0] * draws
    counts = torch.bincount(state + 1, minlength=5)
    assert counts[2] == 0
    kept = expected > 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2 < 16.27  # the 0.999 quantile for 3 degrees of freedom


@pytest.mark.parametrize("views", [1, 2])
def test_the_target_is_invariant_under_batches_without_replacement(views: int) -> None:
    """The transition matrix of one anchor's chain over samples of ``views`` views, by enumeration of all batches."""
    others, batch = 6, 3
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(others, views, dtype=torch.float64, generator=generator)
    score = logits.logsumexp(1)  # of a sample, both views together
    target = score.softmax(0)
    matrix = torch.zeros(others, others, dtype=torch.float64)
    sets = list(combinations(range(others), batch))
    for chosen in sets:
        for state in range(others):
            carried = torch.tensor([[-torch.inf if state in chosen else score[state]]], dtype=torch.float64)
            result = resample(score[list(chosen)][None], carried, torch.ones(1, 1, dtype=torch.float64))
            matrix[state, list(chosen)] += result.weights[0] / len(sets)
            matrix[state, state] += result.carried_weights[0, 0] / len(sets)
    torch.testing.assert_close(matrix.sum(1), torch.ones(others, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(target @ matrix, target, rtol=0, atol=1e-12)
    assert torch.linalg.eigvals(matrix).abs().sort().values[-2] < 1 - 1e-3  # and it mixes
