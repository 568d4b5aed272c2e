"""Emoji as two vendors draw them, and their names. Files of npm's packages emoji-datasource-google and -twitter."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

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
    with tarfile.open(google) as ours, tarfile.open(twitter) as theirs:
        listed = _listed(ours)
        in_both = [each for each in listed if each[2]["has_img_google"] and each[2]["has_img_twitter"]]
        images = [
            torch.stack([_image(tar, f"package/img/{vendor}/64/{form['image']}") for _, _, form in in_both])
            for vendor, tar in (("google", ours), ("twitter", theirs))
        ]
    emoji = torch.tensor([i for i, _, _ in in_both])
    for pictures in images:
        emoji = _joined(emoji, pictures)
    return Drawn(emoji, *images, [name for _, name, _ in in_both])


def _listed(tar: tarfile.TarFile) -> list[tuple[int, str, dict[str, Any]]]:
    """Return number, name and each form of all emoji."""
    file = tar.extractfile("package/emoji.json")
    assert file is not None
    listed = []
    for i, entry in enumerate(json.load(file)):
        name = ", ".join([entry["name"].lower(), *(short.replace("_", " ") for short in entry["short_names"])])
        listed += [(i, name, form) for form in (entry, *entry.get("skin_variations", {}).values())]
    return listed


def _image(tar: tarfile.TarFile, path: str) -> Tensor:
    file = tar.extractfile(path)
    with Image.open(file) as image:  # type: ignore[arg-type]
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
