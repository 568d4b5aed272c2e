"""What can be set of the encoder: what is refused."""

from typing import Any

import pytest

from torch_emc2.settings.model import ModelConfig


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"out_dim": 0}, "out_dim must be at least 1, got 0"),
        ({"hidden_layers": -1}, "hidden_layers must be at least 0, got -1"),
        ({"hidden_layers": 101}, "hidden_layers must be at most 100, got 101"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelConfig(**wrong)
