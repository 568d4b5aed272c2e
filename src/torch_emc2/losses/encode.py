"""The caller's ``encode``, which embeds carried negatives with the encoder's current weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from torch_emc2.unit import unit_vectors
from torch_emc2.validation import Towers

__all__ = ["CheckedEncode", "Encode", "checked_encoders"]

Encode = Callable[[Tensor], Tensor]
"""``encode(ids)`` returns embeddings (k, d) of the samples (or views) ``ids`` (k,), with gradient.

It uses the encoder's current weights. All ranks call it equally often, with different ids; a rank that has none to
encode while another has is given one of its own samples', whose embedding has no weight. So ``encode`` may call a
module that `fully_shard` has split among the ranks. Under DDP it must call the wrapped module itself (``ddp.module``),
because the wrapper expects one forward pass per step."""


class CheckedEncode(Protocol):
    """The caller's ``encode`` as estimators get it: run under the caller's autocast, returning finite unit vectors."""

    def __call__(self, ids: Tensor, *, gradient: bool = True) -> Tensor:
        """Embed ``ids`` (k,): (k, d), with gradient if both the caller's mode and ``gradient`` allow it."""


def checked_encoders(
    encode: Encode | tuple[Encode | None, Encode | None] | None,
    x: Tensor,
    towers: Towers,
    autocast: Callable[[], torch.autocast],
) -> tuple[CheckedEncode | None, CheckedEncode | None]:
    """Return the encoders of either side's ids, None where none is given; they run under the caller's ``autocast``."""
    if towers == 2 and encode is not None:
        if not isinstance(encode, tuple) or len(encode) != 2:
            raise TypeError(f"with towers=2 encode must be a pair (encode_x, encode_y), got {encode!r}")
        of_x, of_y = encode
        return None if of_x is None else _checked(of_x, x, autocast), None if of_y is None else _checked(
            of_y, x, autocast
        )
    if isinstance(encode, tuple):
        raise TypeError("encode must be one function of ids; a pair is for towers=2")
    return None if encode is None else _checked(encode, x, autocast), None


def _checked(encode: Encode, x: Tensor, autocast: Callable[[], torch.autocast]) -> CheckedEncode:
    """Run a caller's ``encode`` under the caller's autocast and gradient modes, giving finite unit vectors (k, d)."""
    grad = torch.is_grad_enabled()

    def encode_unit(ids: Tensor, *, gradient: bool = True) -> Tensor:
        with torch.set_grad_enabled(grad and gradient):
            with autocast():
                embeddings = encode(ids)
            expected = len(ids), x.shape[-1]
            if embeddings.shape != expected:
                raise ValueError(f"encode must return {expected} for {len(ids)} ids, got {tuple(embeddings.shape)}")
            embeddings = embeddings.to(torch.promote_types(x.dtype, torch.float32))
            return unit_vectors(embeddings, lambda row: f"encode({int(ids[row])})")

    return encode_unit
