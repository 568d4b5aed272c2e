"""Unit vectors against a plain sum, and what has no direction."""

import math

import pytest
import torch

from torch_emc2.unit import unit_vectors


@pytest.mark.parametrize(
    ("dtype", "lifted"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_rows_are_divided_by_their_length(dtype: torch.dtype, lifted: torch.dtype, scale: float) -> None:
    z = (scale * torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).to(dtype)
    unit = unit_vectors(z, str)
    assert unit.dtype == lifted
    expected = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in z.double().tolist()]
    torch.testing.assert_close(unit.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ([0.0, 0.0], "has length 0 and so no direction"),
        ([3e-14, 4e-14], "has length 5e-14 and so no direction"),
        ([3e38, 3e38], "has length inf and so no direction"),
        ([1.0, math.nan], "is not finite"),
        ([-math.inf, 1.0], "is not finite"),
    ],
)
def test_the_first_row_without_direction_is_named(row: list[float], what: str) -> None:
    z = torch.tensor([[1.0, 2.0], [3e-6, 4e-6], row, row])
    with pytest.raises(ValueError, match=rf"^row 2 {what}: check the encoder's output$"):
        unit_vectors(z, lambda i: f"row {i}")
    torch.testing.assert_close(unit_vectors(z[:2], str)[1], torch.tensor([0.6, 0.8]))
