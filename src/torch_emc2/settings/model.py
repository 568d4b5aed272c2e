"""What the encoder is made of."""

import os
from dataclasses import dataclass
from typing import Literal

__all__ = ["HUB", "ModelConfig", "Norm", "require_weights"]

Norm = Literal["batch", "group", "none"]

HUB = "hf-hub:"

_MOST_LAYERS = 100


@dataclass
class ModelConfig:
    """What the encoder is made of.

    Attributes:
        backbone: any name that `timm.create_model` takes; one with a tag (resnet18.a1_in1k) or from the hub
            (hf-hub:OWNER/NAME) needs pretrained.
        norm: keep the batch norms, or put group norms or nothing in their place. Other norm layers are left alone.
        stem: "small" is SimCLR's for CIFAR: a 3x3 first convolution with stride 1 and no max pool. "auto" takes it for
            images of at most 64 pixels where the backbone has such a stem to change (the ResNets) and no pretrained
            weights, else "standard".
        hidden_dim: width of the head's hidden layers.
        out_dim: width of the embedding.
        hidden_layers: number of hidden layers of the head; 0 makes it linear.
        feature: what a probe sees: the pooled backbone output, or the head's first hidden layer after its ReLU.
        pretrained: true for timm's own weights of the backbone, or a path: a file of weights, or a folder that also has
            timm's config.json. Images are normalised by their mean and standard deviation. Group norms start with the
            scale and shift of the batch norms.
    """

    backbone: str = "resnet18"
    norm: Norm = "batch"
    stem: Literal["auto", "standard", "small"] = "auto"
    hidden_dim: int = 512
    out_dim: int = 128
    hidden_layers: int = 1
    feature: Literal["backbone", "hidden"] = "backbone"
    pretrained: bool | str = False

    def __post_init__(self) -> None:
        for name, least in (("hidden_dim", 1), ("out_dim", 1), ("hidden_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.hidden_layers > _MOST_LAYERS:
            raise ValueError(f"hidden_layers must be at most {_MOST_LAYERS}, got {self.hidden_layers}")
        if self.pretrained == "":
            raise ValueError("pretrained must be true, false, or a file or folder of weights, got ''")
        if isinstance(self.pretrained, str):
            self.pretrained = os.path.expanduser(self.pretrained)
        _refuse_unused_weights(self)


def require_weights(model: ModelConfig) -> None:
    """Raise ValueError where there is no file or folder of pretrained weights."""
    path = model.pretrained
    if isinstance(path, str) and not os.path.isfile(path):
        if not os.path.isdir(path):
            raise ValueError(
                f"there is no model.pretrained {path!r}: give a file of weights, a folder with their config.json, "
                "or true for timm's own"
            )
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ValueError(
                f"the folder {path!r} has no config.json, by which timm knows what its weights are of: "
                "give model.pretrained the file of weights"
            )


def _refuse_unused_weights(model: ModelConfig) -> None:
    """Refuse what names weights and would not use them, or not for what they were trained for."""
    name = model.backbone
    if not model.pretrained:
        if "." in name or ":" in name:
            raise ValueError(
                f"the backbone {name!r} names pretrained weights, which only model.pretrained loads: set it to true, "
                "or leave them out of the name"
            )
        return
    if ":" in name and not name.startswith(HUB):
        raise ValueError(f"the backbone {name!r} is no name: give the folder or file of weights as model.pretrained")
    if name.startswith(HUB) and model.pretrained is not True:
        raise ValueError(
            f"the backbone {name!r} has weights of its own: set pretrained to true, not {model.pretrained!r}"
        )
    if model.stem == "small":
        raise ValueError("stem small has a first convolution of its own, not the pretrained one: leave stem at auto")
    if model.norm == "none":
        raise ValueError("norm none takes away what pretrained weights were trained with: set it to batch or group")
