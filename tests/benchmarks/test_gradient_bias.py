"""benchmarks/gradient_bias, small: each of its rows is measured, and DCL's is what its gradients say."""

import math
import sys
from pathlib import Path

import pytest

from torch_emc2 import DCLLoss
from torch_emc2.diagnostics import clustered_embeddings, gradient_error

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gradient_bias

LENGTHS = {"epochs": 2, "mixing_epochs": 1, "runs": 2}


@pytest.mark.parametrize("part", gradient_bias.PARTS)
def test_each_row_is_measured(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_bias, "SAMPLES", 16)
    monkeypatch.setattr(gradient_bias, "VIEWS", 32)
    rows = {name: measure(8, LENGTHS) for name, measure in gradient_bias.PARTS[part]().items()}
    assert len(rows) >= 12
    assert all(math.isfinite(error.one_epoch) for errors in rows.values() for error in errors)
    if part == "fixed":
        z = clustered_embeddings(16, 32)
        (dcl,) = rows["DCL"]
        expected = gradient_error(lambda _: DCLLoss(0.07), z, 0.07, 8, ids="view", positive_mass=0.0, **LENGTHS)
        assert dcl.one_epoch == pytest.approx(expected.one_epoch)
        unbiased, with_more = rows["EMC², isir"], rows["EMC², isir, 8 chains"]
        assert with_more[0].one_epoch < unbiased[0].one_epoch
