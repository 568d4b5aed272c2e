"""Staleness of scores against numbers by hand."""

import math
import statistics

import pytest
import torch

from torch_emc2.diagnostics import score_staleness


def test_staleness_by_hand() -> None:
    unit = torch.eye(2)
    anchors = torch.stack([unit[[0, 0]], unit[[0, 0]], unit[[0, 1]]])
    carried = torch.stack([unit[[0, 0]], unit[[1, 1]], unit[[0, 1]]])
    # Today's scores by pair of views, at β = 2: all 2; all 0; and 2 on the diagonal, 0 off it.
    stored = torch.tensor([1.0, 0.5, 2.0])
    stale = score_staleness(stored, anchors, carried, 0.5)
    differences = sorted([1.0] * 4 + [0.5] * 4 + [0, 0, 2, 2])
    assert stale.chains == 3
    assert stale.median == pytest.approx((differences[5] + differences[6]) / 2)
    assert stale.p90 == pytest.approx(0.1 * differences[9] + 0.9 * differences[10])
    assert stale.views_median == 0
    x, y = [1] * 4 + [0.5] * 4 + [2] * 4, [2] * 4 + [0] * 4 + [2, 0, 0, 2]
    mean_x, mean_y = sum(x) / 12, sum(y) / 12
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    assert stale.correlation == pytest.approx(covariance / spread)
    aligned = unit[[0, 1, 0]][:, None].expand(3, 2, 2)
    same = score_staleness(torch.tensor([2.0, 2.0, 0.0]), aligned, unit[[0, 1, 1]][:, None].expand(3, 2, 2), 0.5)
    assert (same.median, same.p90, same.views_median) == (0, 0, 0)
    assert same.correlation == pytest.approx(1)


def test_the_part_of_staleness_that_is_the_views_is_that_of_disjoint_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors, carried = torch.randn(2, 7, 2, 5, dtype=torch.float64, generator=generator)
    stale = score_staleness(torch.zeros(7), anchors, carried, 0.5)
    today = [
        [[2 * float(torch.cosine_similarity(a, c, 0)) for c in of_carried] for a in of_anchor]
        for of_anchor, of_carried in zip(anchors, carried, strict=True)
    ]
    disjoint = [abs(s[0][0] - s[1][1]) for s in today] + [abs(s[0][1] - s[1][0]) for s in today]
    assert stale.views_median == pytest.approx(statistics.median(disjoint))
    assert stale.median == pytest.approx(statistics.median(abs(x) for s in today for row in s for x in row))
