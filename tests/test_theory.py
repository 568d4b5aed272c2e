"""The statements of docs/theory.md, on chains small enough to write down their transition matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def transition_matrix(x: Tensor) -> Tensor:
    """Metropolis–Hastings with uniform proposals over states of logits x (N,)."""
    accept = (x[None] - x[:, None]).exp().clamp(max=1) / len(x)
    matrix = accept - accept.diag().diag()
    return matrix + (1 - matrix.sum(1)).diag()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12), beta=st.sampled_from([0.5, 2.0, 5.0]))
def test_geometric_ergodicity(seed: int, n: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarity = 2 * torch.rand(n, dtype=torch.float64, generator=generator) - 1
    x = beta * similarity
    p, matrix = x.softmax(0), transition_matrix(x)
    torch.testing.assert_close(p @ matrix, p, rtol=0, atol=1e-14)
    rate = float(1 - 1 / (n * p.max()))
    eigenvalues = torch.linalg.eigvals(matrix).real.sort(descending=True).values
    assert float(eigenvalues[1]) == pytest.approx(rate, abs=1e-10)
    assert rate <= 1 - math.exp(-2 * beta)
    power = torch.eye(n, dtype=torch.float64)
    for k in range(1, 20):
        power = power @ matrix
        distance = 0.5 * (power - p).abs().sum(1)  # from every start
        assert (distance <= rate**k + 1e-12).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12), step=st.sampled_from([1e-6, 1e-3, 0.1, 1.0]))
def test_the_kernel_is_lipschitz(seed: int, n: int, step: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 5 * torch.randn(n, dtype=torch.float64, generator=generator)
    moved = x + step * (2 * torch.rand(n, dtype=torch.float64, generator=generator) - 1)
    distance = 0.5 * (transition_matrix(x) - transition_matrix(moved)).abs().sum(1)
    assert (distance <= 2 * (x - moved).abs().max() + 1e-14).all()
