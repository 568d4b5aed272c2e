"""The kernel's probabilities by their definition, and its choices by their frequencies.

That a visit leaves the target invariant is shown of the loss itself, in `losses/test_invariance.py`.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_emc2.kernels.isir import resample


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sets=st.integers(1, 3),
    n=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 300.0]),
    empty=st.booleans(),
)
def test_weights_are_the_softmax_over_proposals_and_carried(
    seed: int, sets: int, n: int, scale: float, empty: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(4, sets, n, dtype=torch.float64, generator=generator)
    carried = scale * torch.randn(4, sets, 3, dtype=torch.float64, generator=generator)
    x[..., 1:][torch.rand(4, sets, n - 1, generator=generator) < 0.3] = -torch.inf
    if empty:
        carried[torch.rand(4, sets, 3, generator=generator) < 0.5] = -torch.inf
    share = torch.rand(4, sets, 3, dtype=torch.float64, generator=generator).softmax(1)
    in_set = torch.randint(sets, (4, 3), generator=generator)
    result = resample(x, carried, share, in_set, 1 - torch.rand(4, 3, dtype=torch.float64, generator=generator))
    weights, carried_weights = torch.zeros_like(x), torch.zeros(4, 3, dtype=torch.float64)
    for row in range(4):
        for s in range(sets):
            for c in range(3):
                p = torch.cat([x[row, s], carried[row, s, c : c + 1]]).softmax(0) * share[row, s, c]
                weights[row, s] += p[:n] / 3
                carried_weights[row, c] += p[n]
    torch.testing.assert_close(result.weights, weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.carried_weights, carried_weights, rtol=1e-9, atol=1e-12)


def test_states_are_chosen_with_these_weights() -> None:
    draws = 100_000
    x = torch.tensor([[[0.0, 5.0, 0.0, 0.0], [0.3, -torch.inf, 1.2, -0.5]]]).expand(draws, 2, 4)
    carried = torch.tensor([[[9.0], [0.8]]]).expand(draws, 2, 1)
    share, in_set = torch.full_like(carried, 0.5), torch.ones(draws, 1, dtype=torch.int64)
    uniform = 1 - torch.rand(draws, 1, generator=torch.Generator().manual_seed(0))
    state = resample(x, carried, share, in_set, uniform).state[:, 0]
    expected = torch.cat([carried[0, 1], x[0, 1]]).softmax(0) * draws
    counts = torch.bincount(state + 1, minlength=5)
    assert counts[2] == 0
    kept = expected > 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2 < 16.27  # the 0.999 quantile for 3 degrees of freedom
