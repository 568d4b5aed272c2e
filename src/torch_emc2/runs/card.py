"""A model card: what a run's model is, how it is used, and what was measured of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch_emc2.config import Config, recorded_config, to_yaml
from torch_emc2.error_text import one_line
from torch_emc2.evaluation import Evaluation, to_text
from torch_emc2.models import Encoder
from torch_emc2.run_folder import evaluations, read_facts
from torch_emc2.settings.images import shorter_side
from torch_emc2.settings.model import ModelConfig

__all__ = ["model_card"]

_CARD = """\
---
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [contrastive-learning, torch-emc2]
---

# {backbone}, trained on {data}

timm's {backbone}, trained by torch-emc2 for {epochs} on {number}images of {data}, without labels: loss `{loss}`,
temperature {temperature}. It makes {width} numbers of an image; the cosine of two images' says how alike they are.

## Use

{use}

## Images

{channels} in [0, 1], {resized}.{normalised}

## Results

{results}

## Settings

```yaml
{settings}```

## Licence

Not stated yet. Whoever publishes these weights says here, and as `license:` at the top, under which they may be
used.{began}
"""

_TIMM = """\
```python
import timm

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
features = model(transform(image)[None])  # image: Pillow's, of mode {mode}
```"""

_OURS = """\
timm cannot build it: its norms or its stem are others. torch-emc2 does:

```python
from torch_emc2.models import load_backbone

model = load_backbone("{file}").eval()
features = model(images)  # (b, {channels}, {size}, {size}), float32 in [0, 1]
```"""

_ONNX = """

`model.onnx` takes `images` (b, {channels}, {size}, {size}), float32 in [0, 1], and gives `features`."""

_NORMALISED = """ Then {mean} is taken from the channels, and the rest divided by {std}: by timm's
transform, or within the model where it takes images in [0, 1]."""

_BEGAN = " Training began with pretrained weights ({weights}), whose own licence counts too."

_HIDDEN = """\
Of the first hidden layer of the projection head. `model.onnx` has it, where there is one; timm's model has not.

"""


def model_card(run: Path, encoder: Encoder, source: str, *, timms: bool, onnx: bool) -> str:
    """Write what there is to know of a run's model, as the hub shows it.

    Args:
        run: the run's folder.
        encoder: its encoder.
        source: where the card's folder is to be found, as local-dir:FOLDER or hf-hub:OWNER/NAME.
        timms: whether timm can build the backbone.
        onnx: whether there is model.onnx.
    """
    config, size = _published(recorded_config(run)), encoder.image_size
    mode = {1: "L", 3: "RGB"}[encoder.channels]
    folder = source.removeprefix("local-dir:") if source.startswith("local-dir:") else "."
    facts = {"channels": encoder.channels, "size": size, "source": source, "mode": mode}
    use = (_TIMM if timms else _OURS).format(file=f"{folder}/model.safetensors", **facts)
    if onnx:
        use += _ONNX.format(**facts)
    mean, std = encoder.architecture.mean, encoder.architecture.std
    number = str(read_facts(run).get("images", "")).partition(",")[0]
    results = "\n\n".join(map(_result, evaluations(run)))
    return _CARD.format(
        library="timm" if timms else "torch-emc2",
        backbone=encoder.architecture.name,
        data=config.data.name,
        epochs="1 epoch" if config.epochs == 1 else f"{config.epochs} epochs",
        number=number and f"{number} ",
        loss=config.loss,
        temperature=config.temperature,
        width=encoder.head[0].in_features,
        use=use,
        channels={1: "Grey", 3: "Red, green and blue"}[encoder.channels],
        resized=_resized(size),
        normalised=_NORMALISED.format(mean=_listed(mean), std=_listed(std)) if mean and std else "",
        results=(_HIDDEN if encoder.config.feature == "hidden" else "") + results if results else "Not measured.",
        settings=to_yaml(config),
        began=_BEGAN.format(weights=_weights(config.model)) if config.model.pretrained else "",
    )


def _published(config: Config) -> Config:
    """Leave out of a config where its files are on this machine."""
    path = config.model.pretrained
    name = os.path.basename(os.path.normpath(path)) if isinstance(path, str) else path
    model = replace(config.model, pretrained=name)
    data = replace(config.data, name=_published_name(config.data.name), root="data")
    return replace(config, model=model, data=data, out=os.path.basename(config.out))


def _weights(model: ModelConfig) -> str:
    return model.pretrained if isinstance(model.pretrained, str) else model.backbone


def _published_name(data: str) -> str:
    kind, colon, place = data.partition(":")
    if kind == "hf" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place) and not os.path.isdir(place):  # all find it
        return data
    return kind + colon + os.path.basename(os.path.normpath(place)) if colon else data


def _resized(size: int) -> str:
    if (shorter := shorter_side(size)) is None:
        return f"resized to {size} × {size} pixels"
    return f"the middle {size} × {size} pixels after the shorter side was made {shorter}"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _result(file: Path) -> str:
    try:
        evaluation = Evaluation(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}): remove it, or evaluate again") from error
    return f"On {_published_name(evaluation.data)}:\n\n```\n{to_text(evaluation)}\n```"
