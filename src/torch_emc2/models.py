"""The encoder: a timm backbone, an MLP projection head, and the files both are kept in."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct
from torch import Tensor, nn

from torch_emc2.error_text import one_line
from torch_emc2.files import whole_file
from torch_emc2.pretrained import RECIPE, Architecture, load_pretrained
from torch_emc2.settings.model import ModelConfig, Norm

__all__ = [
    "SMALL_IMAGE",
    "Encoder",
    "Norm",
    "adapt_backbone",
    "build_encoder",
    "load_backbone",
    "load_encoder",
    "save_backbone",
    "save_encoder",
]

SMALL_IMAGE = 64  # pixels; up to this size a stride-2 convolution and a pooling would throw away too much


class Encoder(nn.Module):
    """Images in [0, 1] to embeddings through `normalize`, `backbone` and `head`; made by `build_encoder`."""

    def __init__(
        self,
        architecture: Architecture,
        config: ModelConfig,
        channels: int,
        image_size: int,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if config.feature == "hidden" and config.hidden_layers < 1:
            raise ValueError("feature='hidden' needs a hidden layer in the head; set hidden_layers to 1 or more, got 0")
        self.config, self.channels, self.image_size = config, channels, image_size
        self.architecture = architecture
        self.normalize = architecture.normalize()
        self.backbone = _build_backbone(architecture, config, channels, image_size, weights)
        width = _output_width(self.backbone, config.backbone, channels, image_size)
        self.head = _build_head(width, config)
        self.feature_dim = width if config.feature == "backbone" else config.hidden_dim
        self.frozen = False

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (b, c, s, s) -> (b, out_dim), not normalised."""
        embedding: Tensor = self.head(self._pooled(images))
        return embedding

    def features(self, images: Tensor) -> Tensor:
        """Compute what a probe sees: images (b, c, s, s) -> (b, feature_dim)."""
        feature = self._pooled(images)
        return feature if self.config.feature == "backbone" else self.head[:2](feature)

    def freeze(self, frozen: bool) -> None:
        """Keep the backbone as it is, its weights and its batch norms' statistics; or train it again."""
        if frozen or self.frozen:  # whatever mode others have put it in
            self.backbone.train(not frozen)
        self.frozen = frozen

    def _pooled(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pooled: Tensor = self.backbone(self.normalize(images))
        return pooled


def build_encoder(config: ModelConfig, channels: int, image_size: int) -> Encoder:
    """Build the encoder that training starts from, for square images.

    Raises:
        ValueError: the backbone's name is unknown (the message lists close ones), its pretrained weights are not
            available, it has no stem that "small" could change, images of this size are too small for it, or
            `feature="hidden"` is set without a hidden layer.
    """
    if not config.pretrained:
        return Encoder(Architecture(config.backbone), config, channels, image_size)
    architecture, weights = load_pretrained(config, channels, image_size)
    return Encoder(architecture, config, channels, image_size, weights)


def adapt_backbone(backbone: nn.Module, norm: Norm, small_stem: bool) -> nn.Module:
    """Change a timm backbone in place, and return it.

    Args:
        backbone: as `timm.create_model` returns it.
        norm: what replaces every `BatchNorm2d`. Group norms start with the batch norm's scale and shift,
            so that residual blocks which start as the identity still do. timm's fused norm-and-activation layers keep
            their activation.
        small_stem: use a 3x3 first convolution with stride 1, and no max pool.
    """
    if norm != "batch":
        _replace_batch_norms(backbone, _group_norm if norm == "group" else _no_norm)
    if small_stem:
        _shrink_stem(backbone)
    return backbone


def save_backbone(encoder: Encoder, path: str | Path) -> None:
    """Write the backbone's weights, under timm's own keys, to a safetensors file.

    With `norm="batch"` and the standard stem, `timm.create_model(name, num_classes=0, in_chans=channels,
    checkpoint_path=path)` loads it; if the weights were pretrained, you then have to normalise images yourself.
    `load_backbone` loads it in every case: the file's metadata says how to build the model.
    """
    _save(encoder.backbone, encoder, path)


def load_backbone(path: str | Path) -> nn.Module:
    """Rebuild the backbone that `save_backbone` wrote, in evaluation mode on the CPU.

    It takes images (b, c, s, s) in [0, 1], normalises them if training did, and returns (b, width).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another model.
    """
    with _naming(path):
        encoder = Encoder(*_read_recipe(path)).eval()
        encoder.backbone.load_state_dict(load_file(path))
    return nn.Sequential(encoder.normalize, encoder.backbone).eval() if encoder.architecture.mean else encoder.backbone


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Write the backbone to `encoder.safetensors` and the head to `head.safetensors` in an existing folder."""
    save_backbone(encoder, Path(folder) / "encoder.safetensors")
    _save(encoder.head, encoder, Path(folder) / "head.safetensors")


def load_encoder(folder: str | Path) -> Encoder:
    """Rebuild the encoder that `save_encoder` wrote, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: one of them is damaged, or of another model.
    """
    backbone, head = Path(folder) / "encoder.safetensors", Path(folder) / "head.safetensors"
    with _naming(backbone):
        encoder = Encoder(*_read_recipe(backbone))
        encoder.backbone.load_state_dict(load_file(backbone))
    with _naming(head):
        encoder.head.load_state_dict(load_file(head))
    return encoder.eval()


def _build_backbone(
    architecture: Architecture,
    config: ModelConfig,
    channels: int,
    image_size: int,
    weights: Mapping[str, Tensor] | None,
) -> nn.Module:
    """Build a backbone with the given weights, or random ones, and adapt it."""
    backbone = architecture.build(channels, image_size)
    if weights is not None:  # they include a classifier's, which is dropped
        backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    if config.stem == "small" and not _has_resnet_stem(backbone):
        raise ValueError(f"backbone {config.backbone!r} has no conv1 and maxpool to make small; set stem='standard'")
    small_stem = config.stem == "small" or (
        config.stem == "auto" and not config.pretrained and image_size <= SMALL_IMAGE and _has_resnet_stem(backbone)
    )
    return adapt_backbone(backbone, config.norm, small_stem)


def _build_head(width: int, config: ModelConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(config.hidden_layers):
        layers += [nn.Linear(width, config.hidden_dim), nn.ReLU()]
        width = config.hidden_dim
    return nn.Sequential(*layers, nn.Linear(width, config.out_dim))


@torch.no_grad()
def _output_width(backbone: nn.Module, name: str, channels: int, image_size: int) -> int:
    """Ask the backbone itself: timm's num_features is not the pooled width everywhere (MobileNetV3)."""
    backbone.eval()
    try:
        width: int = backbone(torch.zeros(1, channels, image_size, image_size)).shape[1]
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"backbone {name!r} cannot take {image_size}x{image_size} images ({error}); use another size or a ResNet"
        ) from error
    backbone.train()
    return width


def _replace_batch_norms(module: nn.Module, replacement: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, replacement(child))
        else:
            _replace_batch_norms(child, replacement)


def _group_norm(batch_norm: nn.BatchNorm2d) -> nn.Module:
    channels = batch_norm.num_features
    # At most 32 groups, as usual, but never one channel a group: a 1x1 map would then be normalised to zero.
    groups = next(g for g in range(min(32, max(1, channels // 2)), 0, -1) if channels % g == 0)
    norm: nn.Module
    if isinstance(batch_norm, BatchNormAct2d):
        norm = GroupNormAct(channels, groups)
        norm.drop, norm.act = batch_norm.drop, batch_norm.act
    else:
        norm = nn.GroupNorm(groups, channels)
    if batch_norm.affine:
        norm.load_state_dict({"weight": batch_norm.weight, "bias": batch_norm.bias})
    return norm


def _no_norm(batch_norm: nn.BatchNorm2d) -> nn.Module:
    if isinstance(batch_norm, BatchNormAct2d):
        return nn.Sequential(OrderedDict(drop=batch_norm.drop, act=batch_norm.act))
    return nn.Identity()


def _has_resnet_stem(backbone: nn.Module) -> bool:
    return isinstance(getattr(backbone, "conv1", None), nn.Conv2d | nn.Sequential) and hasattr(backbone, "maxpool")


def _shrink_stem(backbone: nn.Module) -> None:
    stem: Any = backbone.conv1
    deep = isinstance(stem, nn.Sequential)  # three 3x3 convolutions, only the first of them with a stride
    old = stem[0] if deep else stem
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNets
    if deep:
        stem[0] = new
    else:
        backbone.conv1 = new
    backbone.maxpool = nn.Identity()


def _save(module: nn.Module, encoder: Encoder, path: str | Path) -> None:
    config = replace(encoder.config, pretrained=bool(encoder.config.pretrained))  # without the place of the weights
    recipe = {"config": asdict(config), "channels": encoder.channels, "image_size": encoder.image_size}
    recipe["architecture"] = asdict(encoder.architecture)
    weights = {key: value.contiguous() for key, value in module.state_dict().items()}
    with whole_file(Path(path)) as file:
        save_file(weights, file, metadata={RECIPE: json.dumps(recipe)})


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turn an error from a file's content into one that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors, json, timm and torch each have their own for a damaged file
        raise ValueError(
            f"{str(path)!r} cannot be loaded, it is damaged or of another model ({one_line(error)})"
        ) from error


def _read_recipe(path: str | Path) -> tuple[Architecture, ModelConfig, int, int]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if RECIPE not in metadata:
        raise ValueError("it does not say how its model is built: save_backbone and save_encoder write files that do")
    recipe = json.loads(metadata[RECIPE])
    config = recipe["config"]
    architecture = Architecture(**recipe["architecture"])
    return architecture, ModelConfig(**config), recipe["channels"], recipe["image_size"]
