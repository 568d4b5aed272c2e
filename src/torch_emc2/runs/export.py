"""A run's backbone for others: a folder that timm loads and the Hugging Face hub shows, with a card; and ONNX."""

from __future__ import annotations

import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from torch_emc2.error_text import cause
from torch_emc2.files import whole_file
from torch_emc2.models import Encoder, load_encoder, save_backbone
from torch_emc2.run_folder import require_finished
from torch_emc2.runs.card import model_card
from torch_emc2.settings.images import shorter_side

__all__ = ["export_run"]

_LOG = logging.getLogger(__name__)


def export_run(run: Path, folder: Path, *, onnx: bool = False, push: str | None = None) -> list[Path]:
    """Write a run's backbone to a new folder: model.safetensors, README.md, and config.json for timm.

    Where the run's norms or stem are not those of timm there is no config.json: timm could not build it, and
    README.md says how `load_backbone` does.

    Args:
        run: its folder.
        folder: a new one.
        onnx: write model.onnx too, of the run's features.
        push: OWNER/NAME of a repository of the hub that takes the folder in; a new one is private.

    Returns:
        The files.

    Raises:
        ValueError: the run is not finished, or cannot be written as ONNX.
        FileExistsError: the folder is not empty.
        RuntimeError: it was written, and not pushed.
    """
    require_finished(run)
    if os.path.isdir(folder) and os.listdir(folder):
        raise FileExistsError(f"{folder} is not empty: give a new folder")
    if onnx and find_spec("onnxscript") is None:
        raise ValueError("ONNX is written by another package: python -m pip install onnxscript")
    encoder = load_encoder(run).eval()
    timms = str(encoder.backbone) == str(encoder.architecture.build(encoder.channels, encoder.image_size))
    card = model_card(run, encoder, f"hf-hub:{push}" if push else f"local-dir:{folder}", timms=timms, onnx=onnx)
    if onnx:  # first: where it fails the folder stays empty
        with whole_file(folder / "model.onnx") as file:
            _write_onnx(encoder, file)
    save_backbone(encoder, folder / "model.safetensors")
    if timms:
        with whole_file(folder / "config.json") as file:
            file.write_text(json.dumps(_timm_config(encoder), indent=2) + "\n")
    else:
        _LOG.info("timm cannot build this backbone, whose norms or stem are others: README.md says what loads it.")
    with whole_file(folder / "README.md") as file:
        file.write_text(card, encoding="utf-8")
    if push:
        _push(folder, push)
    return sorted(folder.iterdir())


def _timm_config(encoder: Encoder) -> dict[str, Any]:
    architecture, size = encoder.architecture, encoder.image_size
    known = timm.get_pretrained_cfg(architecture.name)
    kept = {name: getattr(known, name, None) for name in ("fixed_input_size", "first_conv", "classifier")}
    images = {
        "input_size": [encoder.channels, size, size],
        "mean": architecture.mean or [0.0] * encoder.channels,
        "std": architecture.std or [1.0] * encoder.channels,
        "interpolation": "bilinear",
    }
    # As `evaluation_transform` does. timm rounds the size before the crop down, where that rounds.
    shorter = shorter_side(size)
    squashed, cut = {"crop_pct": 1.0, "crop_mode": "squash"}, {"crop_mode": "center"}
    crop = squashed if shorter is None else {"crop_pct": size / (shorter + 0.5), **cut}
    return {
        "architecture": architecture.name,
        "num_classes": 0,
        "num_features": encoder.backbone.num_features,
        "model_args": architecture.args,
        "pretrained_cfg": {**kept, "num_classes": 0, **images, **crop},
    }


def _write_onnx(encoder: Encoder, file: Path) -> None:
    hidden = encoder.head[:2] if encoder.config.feature == "hidden" else nn.Sequential()
    features = nn.Sequential(encoder.normalize, encoder.backbone, *hidden).eval()
    images = torch.rand(2, encoder.channels, encoder.image_size, encoder.image_size)
    try:
        torch.onnx.export(
            features,
            (images,),
            file,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # of torch's compiler, of onnxscript, of onnx
        raise ValueError(
            f"backbone {encoder.config.backbone!r} cannot be written as ONNX ({cause(error)[:200]})"
        ) from error


def _push(folder: Path, name: str) -> None:
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of the network, and of the hub, which has kinds of its own
        advice = f"hf auth login, then hf upload {name} {folder} does it"
        raise RuntimeError(f"{folder} is written, but not pushed to {name} ({cause(error)[:200]}): {advice}") from error
