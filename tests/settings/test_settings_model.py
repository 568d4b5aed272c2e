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
        ({"backbone": "resnet18.a1_in1k"}, "'resnet18.a1_in1k' names pretrained weights.*set it to true"),
        ({"backbone": "hf-hub:timm/resnet18"}, "'hf-hub:timm/resnet18' names pretrained weights.*set it to true"),
        ({"backbone": "local-dir:w", "pretrained": True}, "give the folder or file of weights as model.pretrained"),
        ({"backbone": "hf-hub:timm/resnet18", "pretrained": "w.pth"}, "set pretrained to true, not 'w.pth'"),
        ({"pretrained": ""}, "pretrained must be true, false, or a file or folder of weights, got ''"),
        ({"pretrained": True, "stem": "small"}, "leave stem at auto"),
        ({"pretrained": True, "norm": "none"}, "set it to batch or group"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelConfig(**wrong)
