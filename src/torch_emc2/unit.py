"""Unit vectors: what all similarities are of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["unit_vectors"]


def unit_vectors(z: Tensor, name: Callable[[int], str]) -> Tensor:
    """Normalise embeddings (n, d), in float32 or better.

    Args:
        z: the embeddings.
        name: what to call row i in an error.

    Raises:
        ValueError: an embedding has no direction: it is not finite, or zero (or its length under- or overflows).
    """
    unit = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
    directed = torch.linalg.vector_norm(unit.detach(), dim=1) > 0.5
    if not directed.all():
        row = int((~directed).nonzero()[0])
        finite = bool(z[row].isfinite().all())
        what = f"has length {float(z[row].detach().norm()):g} and so no direction" if finite else "is not finite"
        raise ValueError(f"{name(row)} {what}: check the encoder's output")
    return unit
