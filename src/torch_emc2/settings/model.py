"""What the encoder is made of."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ModelConfig", "Norm"]

Norm = Literal["batch", "group", "none"]

_MOST_LAYERS = 100


@dataclass
class ModelConfig:
    """What the encoder is made of.

    Attributes:
        backbone: any name that `timm.create_model` takes.
        norm: keep the batch norms, or put group norms or nothing in their place. Other norm layers are left alone.
        stem: "small" is SimCLR's for CIFAR: a 3x3 first convolution with stride 1 and no max pool. "auto" takes it for
            images of at most 64 pixels where the backbone has such a stem to change (the ResNets), else "standard".
        hidden_dim: width of the head's hidden layers.
        out_dim: width of the embedding.
        hidden_layers: number of hidden layers of the head; 0 makes it linear.
        feature: what a probe sees: the pooled backbone output, or the head's first hidden layer after its ReLU.
    """

    backbone: str = "resnet18"
    norm: Norm = "batch"
    stem: Literal["auto", "standard", "small"] = "auto"
    hidden_dim: int = 512
    out_dim: int = 128
    hidden_layers: int = 1
    feature: Literal["backbone", "hidden"] = "backbone"

    def __post_init__(self) -> None:
        for name, least in (("hidden_dim", 1), ("out_dim", 1), ("hidden_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.hidden_layers > _MOST_LAYERS:
            raise ValueError(f"hidden_layers must be at most {_MOST_LAYERS}, got {self.hidden_layers}")
