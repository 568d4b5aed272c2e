"""A backbone as timm builds it, and timm's pretrained weights of it."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import timm
from safetensors import safe_open
from timm.models import load_state_dict
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import Tensor, nn
from torchvision.transforms import v2

from torch_emc2.error_text import cause
from torch_emc2.settings.model import HUB, ModelConfig, require_weights

__all__ = ["RECIPE", "Architecture", "load_pretrained"]

RECIPE = "torch_emc2"  # in the metadata of our own files of weights


@dataclass(frozen=True)
class Architecture:
    """What timm builds, and how its images are to be normalised.

    Attributes:
        name: in timm's registry.
        args: further ones for `timm.create_model`, which weights of a folder or of the hub may bring with them.
        mean: what is taken from each channel of images in [0, 1]; None leaves images as they are.
        std: what each channel is then divided by.

    Raises:
        ValueError: timm has no such name; the message lists close ones.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not timm.is_model(self.name):
            close = difflib.get_close_matches(self.name, timm.list_models(), n=5)
            hint = f"close: {', '.join(close)}" if close else "timm.list_models() lists the names"
            raise ValueError(f"timm has no backbone {self.name!r}; {hint}")

    def build(self, channels: int, image_size: int) -> nn.Module:
        """Build it with random weights, and without a classifier."""
        args = {**self.args, "in_chans": channels, **self.size(image_size)}
        backbone: nn.Module = timm.create_model(self.name, num_classes=0, **args)
        return backbone

    def size(self, image_size: int) -> dict[str, int]:
        """Return the size as timm is to be told it: only where there are position embeddings."""
        known = timm.get_pretrained_cfg(self.name)
        return {"img_size": image_size} if known is not None and known.fixed_input_size else {}

    def normalize(self) -> nn.Module:
        """Return what images go through before the backbone."""
        return nn.Identity() if self.mean is None or self.std is None else v2.Normalize(self.mean, self.std)


def load_pretrained(config: ModelConfig, channels: int, image_size: int) -> tuple[Architecture, dict[str, Tensor]]:
    """Load what a config names: what it is of, and its weights, which timm adapts to channels and size.

    Raises:
        ValueError: there are none, they cannot be fetched, or they are of another backbone.
    """
    require_weights(config)
    if not config.backbone.startswith(HUB):
        Architecture(config.backbone.partition(".")[0])  # a wrong name is told of as ever
    try:
        name, architecture, overlay = _source(config)
        # With the classifier that they have: without it timm would take weights where some are missing.
        args: dict[str, Any] = {"in_chans": channels, **architecture.size(image_size)}
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    except Exception as error:  # of timm, of the hub, of the network, of whatever is in a file
        if config.pretrained is True:
            what = f"the pretrained weights of backbone {config.backbone!r} cannot be had"
            advice = "timm.list_pretrained() names those there are; without a network give model.pretrained a file"
        else:
            what = f"the weights in {config.pretrained!r} are none of backbone {config.backbone!r}"
            advice = "model.backbone and model.pretrained must belong together"
        raise ValueError(f"{what} ({cause(error)[:200]}): {advice}") from error
    mean, std = (_of_channels(model.pretrained_cfg[name], channels) for name in ("mean", "std"))
    return replace(architecture, mean=mean, std=std), model.state_dict()


def _source(config: ModelConfig) -> tuple[str, Architecture, dict[str, Any]]:
    """Return timm's name for the weights, what they are of, and what timm is to know of them in another way."""
    name, path = config.backbone, config.pretrained
    if name.startswith(HUB):
        return name, _described(*load_model_config_from_hf(name.removeprefix(HUB))), {}
    if isinstance(path, str) and os.path.isdir(path):
        architecture = _described(*load_model_config_from_path(path))
        if architecture.name != name:
            raise ValueError(f"they are of {architecture.name!r}")
        return f"local-dir:{path}", architecture, {}
    known = timm.get_pretrained_cfg(name)
    architecture = Architecture(name.partition(".")[0])
    if isinstance(path, str):
        _refuse_own(path)
        return name, architecture, {"file": path, "num_classes": _num_classes(path, known), "custom_load": False}
    if known is None or not known.has_weights:
        raise ValueError("timm has none")
    return name, architecture, {}


def _described(cfg: dict[str, Any], name: str, args: dict[str, Any]) -> Architecture:
    ours = ("in_chans", "img_size", "num_classes")
    return Architecture(name, {key: value for key, value in args.items() if key not in ours})


def _refuse_own(path: str) -> None:
    """Refuse the weights of a run, of which timm does not know that their images were not normalised."""
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            if RECIPE in (file.metadata() or {}):
                raise ValueError("they are a run's: give a folder that emc2 export makes of it")


def _num_classes(path: str, known: Any) -> int:
    """Return the classes of a file's classifier; 0 where it has none."""
    classifier = known and known.classifier
    name = classifier if isinstance(classifier, str) or not classifier else classifier[0]
    weight = load_state_dict(path, weights_only=True).get(f"{name}.weight")
    return 0 if weight is None else len(weight)


def _of_channels(values: Sequence[float], channels: int) -> Sequence[float]:
    """Give a value to each channel: grey images have the colours' mean, as timm has it."""
    return values if len(values) == channels else [sum(values) / len(values)] * channels
