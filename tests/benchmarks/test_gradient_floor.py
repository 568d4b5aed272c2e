"""benchmarks/gradient_floor, small: every estimator descends, and InfoNCE's floor is of another objective."""

import math
import sys
from pathlib import Path

import torch

from torch_emc2 import EMC2Loss
from torch_emc2.diagnostics import clustered_embeddings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gradient_floor import DIM, SAMPLES, descend, exact, makers


def test_every_estimator_descends() -> None:
    made = makers()
    metropolis = made["EMC²"](0)
    assert isinstance(metropolis, EMC2Loss)
    assert metropolis.kernel.burn_in == 0  # type: ignore[attr-defined]
    torch.manual_seed(0)
    start, _ = exact(clustered_embeddings(SAMPLES, 16, clusters=8, view_spread=1.0), torch.nn.Linear(16, DIM))
    ends = {name: descend(make(0), 16, 8, 0) for name, make in made.items()}
    assert all(loss < start and math.isfinite(norm) for loss, norm in ends.values()), ends


def test_with_the_whole_data_for_a_batch_dcl_goes_to_zero_and_infonce_does_not() -> None:
    made = makers()
    (_, dcl), (_, infonce) = (descend(made[name](0), SAMPLES, 400, 0) for name in ("DCL", "InfoNCE"))
    assert dcl < 1e-3 < infonce
