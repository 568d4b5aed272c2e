"""Against plain loops, and where the value is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_emc2.evaluation import alignment, effective_rank, label_free_numbers, retrieval, uniformity


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return float(a.double() @ b.double() / a.double().norm() / b.double().norm())


sizes = {"seed": st.integers(0, 2**31), "n": st.integers(2, 9), "d": st.integers(2, 5)}


@settings(max_examples=50, deadline=None)
@given(**sizes)
def test_alignment_is_a_mean_over_images(seed, n, d):
    views = draw(n, 2, d, seed=seed)
    expected = sum(2 - 2 * cosine(a, b) for a, b in views) / n
    assert alignment(views) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(**sizes)
def test_uniformity_is_a_mean_over_pairs_of_images(seed, n, d):
    x = draw(n, d, seed=seed)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    mean = sum(math.exp(-2 * (2 - 2 * cosine(x[i], x[j]))) for i, j in pairs) / len(pairs)
    assert uniformity(x) == pytest.approx(math.log(mean), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(**sizes, chunk=st.integers(1, 20))
def test_retrieval_against_a_loop(seed, n, d, chunk):
    views = draw(n, 2, d, seed=seed)
    flat = views.flatten(0, 1)
    hits = 0
    for a in range(2 * n):
        others = {b: cosine(flat[a], flat[b]) for b in range(2 * n) if b != a}
        partner = others.pop(a + 1 if a % 2 == 0 else a - 1)
        hits += partner > max(others.values())
    assert retrieval(views, chunk_size=chunk) == hits / (2 * n)


def test_known_values():
    circle = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0], [0.0, -1.0]])
    assert uniformity(circle) == pytest.approx(math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6))
    zero = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert uniformity(zero) == pytest.approx(math.log((1 + 2 * math.exp(-2)) / 3))
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert alignment(torch.stack([circle, -circle], 1)) == pytest.approx(4)
    assert alignment(torch.stack([circle, 7 * circle], 1)) == pytest.approx(0, abs=1e-12)
    assert retrieval(torch.stack([circle, 7 * circle], 1)) == 1
    assert retrieval(torch.stack([circle, circle.roll(1, 0)], 1)) == 0
    assert retrieval(torch.eye(4)[:1].expand(6, 2, 4)) == 0  # all are as near


def test_effective_rank_counts_directions():
    assert effective_rank(torch.eye(6)[:4]) == pytest.approx(4)
    assert effective_rank(3 * torch.ones(7, 5)) == pytest.approx(1)
    # Singular values 3 and 1: shares 3/4 and 1/4.
    x = torch.zeros(5, 3)
    x[0, 0], x[1, 1] = 3, 1
    assert effective_rank(x) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    turn = torch.linalg.qr(draw(5, 5)).Q
    assert effective_rank(turn @ x) == pytest.approx(effective_rank(x), rel=1e-5)
    assert effective_rank(100 * x) == pytest.approx(effective_rank(x))
    assert effective_rank(torch.zeros(4, 3)) == pytest.approx(1)


def test_all_numbers_together():
    x, views = draw(6, 4), draw(6, 2, 4, seed=1)
    assert label_free_numbers(x, views) == {
        "alignment": alignment(views),
        "uniformity": uniformity(x),
        "effective_rank": effective_rank(x),
        "retrieval": retrieval(views),
    }


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"shape \(4, 3, 2\); give two views an image"):
        alignment(draw(4, 3, 2))
    with pytest.raises(ValueError, match=r"shape \(1, 3\); give a matrix \(n, d\) with n >= 2"):
        uniformity(draw(1, 3))
    broken = draw(4, 2, 3)
    broken[2, 1, 0] = torch.nan
    with pytest.raises(ValueError, match="views' features are not finite in row 2"):
        retrieval(broken)
