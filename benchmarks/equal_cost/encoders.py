"""Encoders that train in seconds on one core."""

from __future__ import annotations

from itertools import pairwise

from bags import BUCKETS
from torch import Tensor, nn

__all__ = ["DIM", "BagEncoder", "ImageEncoder"]

DIM = 128


class BagEncoder(nn.Module):
    """The sum of a bag's token vectors, and a residual MLP.

    Args:
        std: of the token vectors at the start.
    """

    def __init__(self, std: float = 0.02) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, DIM, mode="sum", sparse=True)
        nn.init.normal_(self.bag.weight, std=std)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, bags: tuple[Tensor, Tensor]) -> Tensor:
        total = self.bag(*bags)
        return total + self.mlp(total)


class ImageEncoder(nn.Module):
    """Four convolutions, each halving a 32 × 32 image; group norm, so that an image is encoded by itself."""

    def __init__(self) -> None:
        super().__init__()
        widths = 3, 32, 64, 128, 128
        blocks = [
            nn.Sequential(nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU())
            for before, width in pairwise(widths)
        ]
        self.layers = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * 128, DIM))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 127.5 - 1)
