"""Which images are held out to test or to choose with, for any number of images a class."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["held_out_fifth"]


def held_out_fifth(labels: Tensor, seed: int = 0) -> Tensor:
    """Choose a random fifth of each class, to within one image, as a mask (n,); a class of one image is left whole.

    Every class thus has images that are not chosen. (scikit-learn's stratified splits refuse a class of one.)

    Args:
        labels: (n,), any integers.
        seed: the choice depends on it and the labels alone.
    """
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[classes[order].argsort(stable=True)]
    order = order[counts[classes[order]] > 1]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order[::5]] = True  # never neighbours, and so never all of a class
    return chosen
