"""The target's numbers against a dense softmax in plain Python."""

import math

import pytest
import torch

from torch_emc2.diagnostics import clustered_embeddings, target_statistics


@pytest.mark.parametrize("similarities", [4096**2, 100])
def test_the_target_is_that_of_a_dense_softmax(similarities: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_emc2.diagnostics.target._SIMILARITIES", similarities)
    z = clustered_embeddings(20, 8).double()
    flat = z.flatten(0, 1).tolist()
    perplexity, effective, peak = [], [], []
    for a, row in enumerate(flat):
        scores = [
            math.exp(sum(x * y for x, y in zip(row, column, strict=True)) / 0.1)
            for b, column in enumerate(flat)
            if b // 2 != a // 2
        ]
        p = [score / sum(scores) for score in scores]
        perplexity.append(math.exp(-sum(q * math.log(q) for q in p)))
        effective.append(1 / sum(q * q for q in p))
        peak.append(38 * max(p))
    steps = [math.log(0.5) / math.log(1 - 1 / value) for value in peak]
    target = target_statistics(z, 0.1, 5)
    assert target.negatives == 38
    assert target.perplexity == pytest.approx(sum(perplexity) / 40)
    assert target.effective == pytest.approx(sum(effective) / 40)
    assert (target.peak, target.peak_max) == pytest.approx((sum(peak) / 40, max(peak)))
    assert (target.steps, target.steps_max) == pytest.approx((sum(steps) / 40, max(steps)))
    assert (target.visits, target.visits_max) == pytest.approx((sum(steps) / 40 / 4, max(steps) / 4))


def test_a_flat_target_is_reached_at_once() -> None:
    for samples in range(3, 40):  # by rounding N max p is less than 1 in some
        target = target_statistics(torch.ones(samples, 2, 3), 0.07, 4)
        negatives = 2 * samples - 2
        assert (target.perplexity, target.effective, target.peak) == pytest.approx((negatives, negatives, 1))
        assert target.steps == pytest.approx(0, abs=0.1)
