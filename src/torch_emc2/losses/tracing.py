"""What a loss cannot be part of: a graph, a transform, a replica."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

__all__ = ["keep_out_of_graphs", "refuse_tracing"]


@cache
def keep_out_of_graphs(loss: type[nn.Module]) -> None:
    """Let a compiled step call losses uncompiled, between its graphs.

    This is done when the first loss is built, because it imports the compiler, which takes seconds.
    """
    reason = "a loss and its memory are no part of a graph: compile without fullgraph=True, or the encoder alone"
    loss.forward = torch.compiler.disable(loss.forward, reason=reason)  # type: ignore


def refuse_tracing(loss: nn.Module) -> None:
    """Raise RuntimeError where a call could not change the memory, or only that of a copy."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "a loss cannot be transformed by torch.func (grad, vmap, …): take its gradient with loss.backward() or "
            "torch.autograd.grad; no state has changed"
        )
    if getattr(loss, "_is_replica", False):
        raise RuntimeError(
            "a loss cannot be part of what nn.DataParallel copies to each device: wrap the encoder alone, or use "
            "DistributedDataParallel; no state has changed"
        )
