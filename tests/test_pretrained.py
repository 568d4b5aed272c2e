"""Pretrained weights: which are taken, what images they see, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from torch_emc2.models import build_encoder, load_backbone, load_encoder, save_encoder
from torch_emc2.settings.model import HUB, ModelConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def weights_of(name: str, **args: Any) -> dict[str, Tensor]:
    """Give every weight and running statistic a value of its own, as training would."""
    generator = torch.Generator().manual_seed(3)
    weights: dict[str, Tensor] = timm.create_model(name, **args).state_dict()
    for tensor in weights.values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return weights


def folder_of(weights: dict[str, Tensor], folder: Path, **cfg: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    cfg = {"mean": MEAN, "std": STD, "num_classes": 1000, "classifier": "fc", "first_conv": "conv1.0"} | cfg
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": cfg}))
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, and no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def in_cache(weights: dict[str, Tensor], cache: Path, name: str, **cfg: Any) -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    folder_of(weights, repository / "snapshots" / "0a1b", **cfg)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a1b")


def images(channels: int = 3, size: int = 64) -> Tensor:
    return torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(1))


def by_hand(weights: dict[str, Tensor], mean: Any = MEAN, std: Any = STD) -> Callable[[Tensor], Tensor]:
    """Load weights by torch alone, and normalise images by torchvision's formula."""
    model = timm.create_model("test_resnet", num_classes=0, in_chans=len(mean))
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("fc.")})
    model.eval()
    return lambda x: model((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])  # type: ignore[no-any-return]


def test_weights_of_a_file_a_folder_the_hub_or_timm_are_those_of_timm(tmp_path: Path, offline: Path) -> None:
    weights = weights_of("test_resnet")
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "w.pth")
    bare = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    torch.save(bare, tmp_path / "bare.pth")
    other = bare | {"fc.weight": torch.zeros(7, 96), "fc.bias": torch.zeros(7)}
    save_file(other, tmp_path / "seven.safetensors")
    folder = folder_of(weights, tmp_path / "folder")
    in_cache(weights, offline, "own/tiny")
    in_cache(weights, offline, "timm/test_resnet.r160_in1k")  # where timm's own are
    timms = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    of_timm, of_folder = by_hand(weights, timms.mean, timms.std), by_hand(weights)
    assert not torch.allclose(of_timm(images()), of_folder(images()))
    for backbone, pretrained, expected in [
        ("test_resnet", str(tmp_path / "w.safetensors"), of_timm),
        ("test_resnet.r160_in1k", str(tmp_path / "w.pth"), of_timm),
        ("test_resnet", str(tmp_path / "bare.pth"), of_timm),
        ("test_resnet", str(tmp_path / "seven.safetensors"), of_timm),
        ("test_resnet", str(folder), of_folder),
        (HUB + "own/tiny", True, of_folder),
        ("test_resnet", True, of_timm),
        ("test_resnet.r160_in1k", True, of_timm),
    ]:
        encoder = build_encoder(ModelConfig(backbone, pretrained=pretrained), 3, 64)
        assert encoder.training
        torch.testing.assert_close(encoder.eval().features(images()), expected(images()), rtol=0, atol=0)
        torch.testing.assert_close(encoder(images()), encoder.head(expected(images())), rtol=0, atol=0)


def test_grey_images_have_the_colours_mean_and_the_sum_of_their_weights(tmp_path: Path) -> None:
    weights = weights_of("test_resnet")
    folder = folder_of(weights, tmp_path / "folder")
    encoder = build_encoder(ModelConfig("test_resnet", pretrained=str(folder)), 1, 64).eval()
    grey = weights | {"conv1.0.weight": weights["conv1.0.weight"].sum(1, keepdim=True)}
    expected = by_hand(grey, (sum(MEAN) / 3,), (sum(STD) / 3,))
    torch.testing.assert_close(encoder.features(images(1)), expected(images(1)))


def test_position_embeddings_are_stretched_to_the_size(tmp_path: Path) -> None:
    weights = weights_of("test_vit")
    save_file(weights, tmp_path / "w.safetensors")
    encoder = build_encoder(ModelConfig("test_vit", pretrained=str(tmp_path / "w.safetensors")), 3, 64)
    position = resample_abs_pos_embed(weights["pos_embed"], [4, 4])
    torch.testing.assert_close(encoder.backbone.pos_embed, position)
    save_encoder(encoder, tmp_path)
    torch.testing.assert_close(load_encoder(tmp_path).backbone.pos_embed, position, rtol=0, atol=0)


def test_group_norms_start_with_the_pretrained_scale_and_the_stem_is_kept_for_small_images(tmp_path: Path) -> None:
    weights = weights_of("test_resnet")
    save_file(weights, tmp_path / "w.safetensors")
    encoder = build_encoder(ModelConfig("test_resnet", "group", pretrained=str(tmp_path / "w.safetensors")), 3, 32)
    own = encoder.backbone.state_dict()
    assert not [name for name in own if "running" in name]
    torch.testing.assert_close(own, {name: weights[name] for name in own}, rtol=0, atol=0)
    assert isinstance(encoder.backbone.maxpool, nn.MaxPool2d)


def test_saved_files_need_neither_the_weights_they_started_from_nor_a_network(tmp_path: Path, offline: Path) -> None:
    weights = weights_of("test_resnet")
    for source in (str(folder_of(weights, tmp_path / "folder")), True):
        if source is True:
            in_cache(weights, offline, "own/tiny")
        config = ModelConfig(HUB + "own/tiny" if source is True else "test_resnet", pretrained=source)
        encoder = build_encoder(config, 3, 32).eval()
        (tmp_path / "run").mkdir()
        save_encoder(encoder, tmp_path / "run")
        shutil.rmtree(offline if source is True else source)
        loaded = load_encoder(tmp_path / "run").eval()
        assert loaded.config == replace(config, pretrained=True)  # wherever the weights were
        torch.testing.assert_close(loaded(images(3, 32)), encoder(images(3, 32)), rtol=0, atol=0)
        backbone = load_backbone(tmp_path / "run" / "encoder.safetensors").eval()
        torch.testing.assert_close(backbone(images(3, 32)), by_hand(weights)(images(3, 32)), rtol=0, atol=0)
        timms = timm.create_model("test_resnet", num_classes=0, checkpoint_path=tmp_path / "run/encoder.safetensors")
        torch.testing.assert_close(timms.state_dict(), encoder.backbone.state_dict(), rtol=0, atol=0)
        shutil.rmtree(tmp_path / "run")


def test_what_does_not_fit_is_refused_in_a_line(tmp_path: Path, offline: Path) -> None:
    weights = weights_of("test_resnet")
    save_file(weights, tmp_path / "w.safetensors")
    missing, further, shaped = dict(weights), weights | {"extra.weight": torch.zeros(1)}, dict(weights)
    del missing["layer1.0.conv1.weight"]
    shaped["layer1.0.conv1.weight"] = torch.zeros(1, 1, 3, 3)
    save_file({name: value for name, value in missing.items() if name[:2] != "fc"}, tmp_path / "missing.safetensors")
    torch.save(further, tmp_path / "further.pth")
    torch.save(shaped, tmp_path / "shaped.pth")
    (tmp_path / "damaged.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:999])
    (tmp_path / "notes.txt").write_text("no weights")
    folder_of(weights, tmp_path / "folder")
    folder_of(missing, tmp_path / "torn")
    (tmp_path / "run").mkdir()
    save_encoder(build_encoder(ModelConfig("test_resnet", stem="standard"), 3, 64), tmp_path / "run")
    for backbone, file, words in [
        ("test_resnet", "missing.safetensors", 'Missing key(s) in state_dict: "layer1.0.conv1.weight"'),
        ("test_resnet", "further.pth", 'Unexpected key(s) in state_dict: "extra.weight"'),
        ("test_resnet", "shaped.pth", "size mismatch for layer1.0.conv1.weight"),
        ("test_resnet", "damaged.safetensors", "damaged.safetensors' are none of backbone 'test_resnet'"),
        ("test_resnet", "notes.txt", "notes.txt' are none of backbone 'test_resnet'"),
        ("test_vit", "w.safetensors", "w.safetensors' are none of backbone 'test_vit'"),
        ("test_resnet.a2", "w.safetensors", "Invalid pretrained tag (a2) for test_resnet"),
        ("test_resnet", "torn", 'Missing key(s) in state_dict: "layer1.0.conv1.weight"'),
        ("test_vit", "folder", "they are of 'test_resnet'"),
        ("test_resnet", "run/encoder.safetensors", "they are a run's: give a folder that emc2 export makes of it"),
        ("test_resnet", "nowhere.pth", "there is no model.pretrained"),
        ("test_resnet", "run", "has no config.json"),
        ("resnet81", "w.safetensors", "timm has no backbone 'resnet81'; close:"),
        ("resnet81", None, "timm has no backbone 'resnet81'; close:"),
        ("test_resnet", None, "the pretrained weights of backbone 'test_resnet' cannot be had"),
        (HUB + "own/tiny", None, "'hf-hub:own/tiny' cannot be had"),
        (HUB + "tiny@@", None, "'hf-hub:tiny@@' cannot be had"),
        ("resnet10t.a2", None, "Invalid pretrained tag (a2) for resnet10t"),
        ("beit3_giant_patch14_224", None, "cannot be had (timm has none)"),
    ]:
        config = ModelConfig(backbone, pretrained=str(tmp_path / file) if file else True)
        with pytest.raises(ValueError) as refused:
            build_encoder(config, 3, 64)
        (line,) = str(refused.value).splitlines()
        assert words in line
    build_encoder(replace(config, backbone="test_resnet", pretrained=str(tmp_path / "folder")), 3, 64)
