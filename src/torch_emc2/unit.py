"""Unit vectors: what all similarities are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["unit_vectors"]

_SHORTEST = 5e-13  # a length below it is a rounding error


def unit_vectors(z: Tensor, name: Callable[[int], str]) -> Tensor:
    """Normalise embeddings (n, d), in float32 or better.

    Args:
        z: the embeddings.
        name: what to call row i in an error.

    Raises:
        ValueError: an embedding has no direction: it is not finite, or zero (or its length under- or overflows).
    """
    unit, length = _Normalised.apply(z if z.dtype in (torch.float32, torch.float64) else z.float())
    if length.numel():
        shortest, longest = torch.stack(torch.aminmax(length)).tolist()  # one wait for a GPU
        if not (shortest > _SHORTEST and longest < torch.inf):
            _refuse(z.detach(), length, name)
    return unit  # type: ignore[no-any-return]


def _refuse(z: Tensor, length: Tensor, name: Callable[[int], str]) -> None:
    row = int((~((length > _SHORTEST) & (length < torch.inf))).nonzero()[0, 0])
    finite = bool(z[row].isfinite().all())
    what = f"has length {float(z[row].norm()):g} and so no direction" if finite else "is not finite"
    raise ValueError(f"{name(row)} {what}: check the encoder's output")


class _Normalised(torch.autograd.Function):
    """z / |z|, and |z| (n, 1) as a constant; the gradient is what g has across u, divided by |z|."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        unit = z / length
        ctx.save_for_backward(unit, length)
        ctx.mark_non_differentiable(length)
        ctx.set_materialize_grads(False)
        return unit, length

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> Tensor:
        unit, length = ctx.saved_tensors
        along = (gradient * unit).sum(1, keepdim=True)  # vecdot would be cast where the caller's autocast is on
        return torch.addcmul(gradient, along, unit, value=-1).div_(length)
