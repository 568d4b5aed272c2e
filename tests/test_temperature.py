"""Which temperatures there are."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from torch_emc2.temperature import require_temperature


@pytest.mark.parametrize("value", [1, 0.5, 1e-30, 1e300, Fraction(1, 3), np.float32(0.1), np.int64(2)])
def test_positive_numbers_are_taken_as_they_are(value: object) -> None:
    temperature = require_temperature(value)
    assert type(temperature) is float
    assert temperature == float(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -0.1, 1e-31, float("nan"), float("inf"), 10**400])
def test_other_numbers_are_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"temperature must be a positive number \(at least 1e-30\), got"):
        require_temperature(value)


@pytest.mark.parametrize("value", [torch.tensor(0.1), torch.nn.Parameter(torch.tensor(0.1))])
def test_a_tensor_is_told_that_it_cannot_be_learnt(value: object) -> None:
    with pytest.raises(TypeError, match=r"must be a number, such as 0\.07, got a \w+: it cannot be learnt yet$"):
        require_temperature(value)


@pytest.mark.parametrize("value", [None, "0.1", True, np.array(0.1), [0.1]])
def test_what_is_no_number_is_named(value: object) -> None:
    with pytest.raises(TypeError, match=rf"must be a number, such as 0\.07, got {re.escape(repr(value))}$"):
        require_temperature(value)
