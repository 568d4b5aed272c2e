"""open_clip's training step with EMC² in the place of its ClipLoss: a tiny CLIP on drawn pictures and their names."""

import argparse

import numpy as np
import torch
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from PIL import Image, ImageDraw
from torch import Tensor

from torch_emc2.integrations.open_clip import EMC2ClipLoss

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "cyan", "brown", "pink", "gray", "lime"]
SHAPES = {"circle": "ellipse", "square": "rectangle", "triangle": "polygon"}
GROUNDS = ["black", "navy", "olive", "teal"]
NAMES = [f"a {one} {shape} on {ground}" for one in COLOURS for shape in SHAPES for ground in GROUNDS]


def draw(name: str, generator: np.random.Generator) -> Image.Image:
    """Another picture each time: somewhere, of some size."""
    _, colour, shape, _, ground = name.split()
    picture = Image.new("RGB", (24, 24), ground)
    size = generator.integers(8, 14)
    left, top = generator.integers(0, 24 - size, 2)
    corners = [(left, top), (left + size, top + size)]
    if shape == "triangle":
        corners = [(left, top + size), (left + size, top + size), (left + size // 2, top)]
    getattr(ImageDraw.Draw(picture), SHAPES[shape])([tuple(map(int, corner)) for corner in corners], fill=colour)
    return picture


def pictures(names: list[str], generator: np.random.Generator) -> Tensor:
    drawn = np.stack([np.asarray(draw(name, generator)) for name in names])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def named_rightly(model: CLIP, texts: Tensor) -> float:
    """How often, in per cent, a new picture's own name is the nearest of all."""
    model.eval()
    images, names, _ = model(pictures(NAMES, np.random.default_rng(1)), texts).values()
    model.train()
    return 100 * ((images @ names.T).argmax(1) == torch.arange(len(NAMES))).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    texts = SimpleTokenizer(context_length=12)(NAMES)
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 6, "image_size": 24}
    model = CLIP(32, vision, {"layers": 1, "width": 64, "heads": 2, "context_length": 12}, output_dict=True)
    loss = EMC2ClipLoss(model)  # was ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    print(f"{named_rightly(model, texts):.1f}% of {len(NAMES)} pictures named rightly at first")
    for _ in range(args.steps):
        batch = torch.from_numpy(generator.choice(len(NAMES), 32, replace=False))
        images = pictures([NAMES[each] for each in batch], generator)
        losses = loss(**model(images, texts[batch]), output_dict=True)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    print(f"{named_rightly(model, texts):.1f}% after {args.steps} steps of 32")


if __name__ == "__main__":
    main()
