import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from torch_emc2.evaluation import linear_probe, sgd_probe
from torch_emc2.evaluation.probe import L2_DEFAULT, L2_GRID, logistic_regression


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    return x[:600], y[:600], x[600:900], y[600:900]


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def standardised(train, test):
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    std[std == 0] = 1
    return ((train - mean) / std).numpy(), ((test - mean) / std).numpy()


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_fit_is_a_stationary_point_of_the_stated_objective(digits, l2):
    x, _ = standardised(digits[0], digits[2])
    y = digits[1].numpy()
    model = logistic_regression().set_params(C=1 / (l2 * len(x))).fit(x, y)
    residual = softmax(x @ model.coef_.T + model.intercept_) - np.eye(10)[y]
    gradient = np.column_stack([residual.T @ x / len(x) + l2 * model.coef_, residual.mean(0)])
    assert np.abs(gradient).max() < 1.1e-5


def test_accuracy_is_that_of_the_chosen_strength_at_the_optimum(digits):
    train_x, train_y, test_x, test_y = digits
    result = linear_probe(*digits)
    assert tuple(result.validation) == L2_GRID
    assert result.validation[result.l2] == max(result.validation.values())
    assert all(result.validation[l2] < result.validation[result.l2] for l2 in L2_GRID if l2 > result.l2)
    # An independent optimiser on the same convex problem: Newton-like steps in float64 by PyTorch's own L-BFGS.
    x, held = (torch.tensor(a) for a in standardised(train_x, test_x))
    weight = torch.zeros(10, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, train_y)
        loss = loss + result.l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    expected = ((held @ weight.T + bias).argmax(1) == test_y).double().mean().item()
    assert result.accuracy == pytest.approx(expected, abs=1 / len(test_y))
    assert result.accuracy > 0.85


def test_features_scale_and_shift_do_not_matter(digits):
    train_x, train_y, test_x, test_y = digits
    moved = linear_probe(train_x * 100 + 7, train_y, test_x * 100 + 7, test_y)
    assert moved.accuracy == pytest.approx(linear_probe(*digits).accuracy, abs=2 / len(test_y))


def test_strength_is_chosen_without_the_test_part(digits):
    train_x, train_y, test_x, test_y = digits
    result = linear_probe(train_x, train_y, test_x, test_y)
    other = linear_probe(train_x, train_y, torch.zeros_like(test_x[:3]), test_y[:3])
    assert (other.l2, other.validation) == (result.l2, result.validation)


def test_features_are_standardised_by_the_rows_that_are_fitted_alone():
    """A value that is far out flattens its feature for the classifier, unless it is in a row that is held out."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = (2.0 * y - 1 + 0.1 * torch.randn(60, generator=generator))[:, None]
    test_x, test_y = x[:10], y[:10]
    held_out, far = 0, torch.full((1, 1), 1e8)
    for seed in range(15):
        best = max(
            linear_probe(torch.cat([x, far]), torch.cat([y, y[:1]]), test_x, test_y, seed=seed).validation.values()
        )
        assert best > 0.85 or best < 0.7, "one wrong at most, or hardly better than chance"
        held_out += best > 0.85
    assert 1 <= held_out <= 8  # about a fifth, by the seed
    assert linear_probe(x, y, torch.cat([test_x, far]), torch.cat([test_y, test_y[:1]])).accuracy >= 10 / 11


def test_memory_is_that_of_one_copy_of_the_features_and_theirs_are_left_alone():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(30_000) % 2
    x = torch.randn(30_000, 64, generator=generator) + 3 * y[:, None]
    before = x.clone()
    tracemalloc.start()
    try:
        result = linear_probe(x, y, x[:500], y[:500])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.accuracy == 1
    assert peak < 1.7 * x.numel() * 4
    assert torch.equal(x, before)


def test_noise_calls_for_strong_regularisation_and_a_clean_signal_for_little():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    noise = torch.randn(400, 200, generator=generator)
    noisy = noise.clone()
    noisy[:, 0] += 2 * y
    assert linear_probe(noisy[:200], y[:200], noisy[200:], y[200:]).l2 >= 0.1
    curved = torch.randn(400, 1, generator=generator).abs() * (2 * y[:, None] - 1)
    assert linear_probe(curved[:200], y[:200], curved[200:], y[200:]).accuracy > 0.95


def test_sgd_probe_follows_the_published_protocol(digits):
    """A loop by hand with the same first weights and order of rows."""
    train_x, train_y, test_x, test_y = digits
    generator = torch.Generator().manual_seed(5)
    bound = 1 / 8  # 64 features
    weight = torch.empty(10, 64).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(10).uniform_(-bound, bound, generator=generator)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for _ in range(20):
        order = torch.randperm(600, generator=generator)
        for start in range(0, 600, 256):
            rows = order[start : start + 256]
            residual = (train_x[rows] @ weight.T + bias).softmax(1) - torch.eye(10)[train_y[rows]]
            speed_w = 0.9 * speed_w + residual.T @ train_x[rows] / len(rows)
            speed_b = 0.9 * speed_b + residual.mean(0)
            weight, bias = weight - 1e-3 * speed_w, bias - 1e-3 * speed_b
    expected = ((test_x @ weight.T + bias).argmax(1) == test_y).double().mean().item()
    accuracy = sgd_probe(*digits, batch_size=256, epochs=20, seed=5)
    assert accuracy == pytest.approx(expected, abs=1e-12)
    assert 0.3 < accuracy < 0.9  # far from the end, so weights that moved differently would show


@pytest.mark.parametrize(
    "probe", [lambda *part: linear_probe(*part).accuracy, lambda *part: sgd_probe(*part, epochs=20)]
)
@pytest.mark.parametrize(
    "renamed",
    [lambda y: y.to(torch.uint8), lambda y: y.to(torch.int16), lambda y: y.to(torch.int32), lambda y: y * 10**8 + 3],
    ids=["uint8", "int16", "int32", "large, with gaps"],
)
def test_what_numbers_classes_have_does_not_matter(digits, probe, renamed):
    train_x, train_y, test_x, test_y = (part[:200] for part in digits)
    expected = probe(train_x, train_y, test_x, test_y)
    assert probe(train_x, renamed(train_y), test_x, renamed(test_y)) == expected
    assert expected > 0.3


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=8))
def test_any_number_of_rows_a_class(counts):
    classes = len(counts)
    y = torch.repeat_interleave(torch.arange(classes), torch.tensor(counts))
    x = torch.eye(classes)[y] + 0.1 * torch.randn(len(y), classes, generator=torch.Generator().manual_seed(0))
    result = linear_probe(x, y, torch.eye(classes), torch.arange(classes))
    if max(counts) == 1:
        assert (result.l2, result.validation) == (L2_DEFAULT, {})
    else:
        assert set(result.validation) == set(L2_GRID)
    train, test = standardised(x, torch.eye(classes))
    by_hand = LogisticRegression(C=1 / (result.l2 * len(x)), max_iter=10_000, tol=1e-6).fit(train, y)
    assert result.accuracy == by_hand.score(test, range(classes))


def test_one_class_is_refused(digits):
    train_x, train_y, test_x, test_y = digits
    with pytest.raises(ValueError, match="all 600 training labels are 4; a probe needs two classes"):
        linear_probe(train_x, torch.full_like(train_y, 4), test_x, test_y)
