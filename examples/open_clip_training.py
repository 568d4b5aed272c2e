"""open_clip's training step with EMC² in the place of its ClipLoss: a tiny CLIP on drawn pictures and their names.

python examples/open_clip_training.py
torchrun --nproc-per-node 2 examples/open_clip_training.py    # each has half of the batch, and all of it for negatives
"""

import argparse
import os

import numpy as np
import torch
import torch.distributed as dist
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if "RANK" in os.environ:  # as torchrun starts it
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    texts = SimpleTokenizer(context_length=12)(NAMES)
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 6, "image_size": 24}
    clip = CLIP(32, vision, {"layers": 1, "width": 64, "heads": 2, "context_length": 12}, output_dict=True)
    loss = EMC2ClipLoss(clip)  # was ClipLoss(); gathers by itself
    model = DistributedDataParallel(clip) if world > 1 else clip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if rank == 0:
        print(f"{named_rightly(clip, texts):.1f}% of {len(NAMES)} pictures named rightly at first")
    batches, drawing = np.random.default_rng(0), np.random.default_rng((1, rank))
    for _ in range(args.steps):
        batch = torch.from_numpy(batches.choice(len(NAMES), 32, replace=False))[rank::world]
        images = pictures([NAMES[each] for each in batch], drawing)
        losses = loss(**model(images, texts[batch]), output_dict=True)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    if rank == 0:
        print(f"{named_rightly(clip, texts):.1f}% after {args.steps} steps of 32 in {world} process(es)")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
