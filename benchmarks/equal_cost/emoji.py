"""Emoji as two vendors draw them, and their names. Files of npm's packages emoji-datasource-google and -twitter."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["Drawn", "drawn"]

SIZE = 32


class Drawn(NamedTuple):
    """Emoji that both vendors draw, each skin tone by itself.

    Attributes:
        emoji: (n,) which; tones of one, and those that a vendor draws alike, are the same.
        google: (n, 3, 32, 32) uint8, on white.
        twitter: (n, 3, 32, 32) uint8, on white.
        names: n of them.
    """

    emoji: Tensor
    google: Tensor
    twitter: Tensor
    names: list[str]


def drawn(google: Path, twitter: Path) -> Drawn:
    """Read both packages."""
    ours, theirs = _read(google), _read(twitter)
    forms = []  # number, name and file of each
    for i, entry in enumerate(json.loads(ours["emoji.json"])):
        name = ", ".join([entry["name"].lower(), *(short.replace("_", " ") for short in entry["short_names"])])
        for form in (entry, *entry.get("skin_variations", {}).values()):
            if form["has_img_google"] and form["has_img_twitter"]:
                forms.append((i, name, form["image"]))
    emoji = torch.tensor([i for i, _, _ in forms])
    images = [torch.stack([_image(files[file]) for _, _, file in forms]) for files in (ours, theirs)]
    for pictures in images:
        emoji = _joined(emoji, pictures)
    return Drawn(emoji, *images, [name for _, name, _ in forms])


def _read(package: Path) -> dict[str, bytes]:
    """Read the list and the images of 64 pixels, by name; in the archive's order, which is compressed as a whole."""
    found = {}
    with tarfile.open(package) as tar:
        for member in tar:
            path = Path(member.name)
            if path.name == "emoji.json" or path.parent.name == "64":
                file = tar.extractfile(member)
                assert file is not None
                found[path.name] = file.read()
    return found


def _image(file: bytes) -> Tensor:
    with Image.open(BytesIO(file)) as image:
        own = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BOX)
    white = Image.new("RGBA", own.size, "white")
    return torch.from_numpy(np.array(Image.alpha_composite(white, own).convert("RGB"))).permute(2, 0, 1)


def _joined(emoji: Tensor, images: Tensor) -> Tensor:
    """Give emoji that have an image in common the lowest of their numbers."""
    _, same = torch.unique(images.flatten(1), dim=0, return_inverse=True)
    while True:
        lowest = torch.full_like(same, len(emoji)).scatter_reduce(0, same, emoji, "amin")[same]
        by_emoji = torch.full_like(emoji, len(emoji)).scatter_reduce(0, emoji, lowest, "amin")[emoji]
        if torch.equal(by_emoji, emoji):
            return emoji
        emoji = by_emoji
