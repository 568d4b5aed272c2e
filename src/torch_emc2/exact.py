"""The exact global contrastive loss and its gradient, for data sets small enough to enumerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torch_emc2.temperature import require_temperature
from torch_emc2.unit import unit_vectors

__all__ = ["global_backward", "global_contrastive_loss"]


def global_contrastive_loss(
    z: Tensor, temperature: float, *, chunk_size: int | None = None, include_positive: bool = False
) -> Tensor:
    """Global contrastive loss over all views of all samples, a scalar with exact gradient (Yau et al. 2024, eq. 1).

    ``mean_a[ -β s_pos + log Σ_z exp(β s_z) ]``, where a runs over all views, z over all views of the other samples, and
    with more than two views ``s_pos`` is the mean over the sample's other ones.

    It is computed in float32 or more, under autocast too, and differentiable once: `create_graph=True` raises
    RuntimeError.

    Args:
        z: (m, views, d) embeddings, m >= 2, views >= 2; normalised here. float64 stays float64.
        temperature: 1 / β.
        chunk_size: rows and columns at a time; memory beyond ``z`` and its gradient is O(chunk_size²). Default: all.
        include_positive: put the sample's own other views into the denominator too, as InfoNCE does.

    Raises:
        ValueError: shapes or sizes do not fit, or an embedding is not finite or zero.
        TypeError: the temperature is a tensor or no number.
    """
    if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] < 2:
        raise ValueError(f"z must be (m, views, d) with m >= 2 and views >= 2, got {tuple(z.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    temperature = require_temperature(temperature)
    m, views, _ = z.shape
    with torch.autocast(z.device.type, enabled=False):
        flat = unit_vectors(z.flatten(0, 1), lambda row: f"z[{row // views}, {row % views}]")
        z = flat.view(m, views, -1)
        siblings = (z.sum(1, keepdim=True) - z).flatten(0, 1) / (views - 1)
        positive = (flat * siblings).sum(1).mean() / temperature
        log_mass: Tensor = _MeanLogMass.apply(flat, views, 1 / temperature, chunk_size or m * views, include_positive)
        return log_mass - positive


def global_backward(
    embed: Callable[[Tensor], Tensor],
    num_samples: int,
    temperature: float,
    *,
    embed_chunk_size: int = 256,
    chunk_size: int = 4096,
    include_positive: bool = False,
) -> Tensor:
    """Add the exact gradient of the global loss to the ``.grad`` of all parameters behind ``embed``, and return the
    loss.

    In two passes, so that memory does not hold the graph of the whole data set: embed without graph, take the gradient
    at the embeddings, embed again chunk by chunk and propagate it back.

    Args:
        embed: ids (k,) -> embeddings (k, views, d); the same for the same ids, whatever chunk they come in (no batch
            norm in training mode).
        num_samples: size m of the data set; ids are 0 … m - 1.
        temperature: 1 / β.
        embed_chunk_size: samples embedded at a time.
        chunk_size: as in `global_contrastive_loss`.
        include_positive: as in `global_contrastive_loss`.
    """
    chunks = torch.split(torch.arange(num_samples), embed_chunk_size)
    with torch.no_grad():
        z = torch.cat([embed(ids) for ids in chunks])
    z.requires_grad_()
    loss = global_contrastive_loss(z, temperature, chunk_size=chunk_size, include_positive=include_positive)
    (gradient,) = torch.autograd.grad(loss, z)
    for ids in chunks:
        torch.autograd.backward(embed(ids), gradient[ids])
    return loss.detach()


class _MeanLogMass(torch.autograd.Function):
    """Mean over rows of log Σ exp(β s) over their negatives; the gradient is formed with the value, block by block."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, views: int, beta: float, chunk_size: int, include_positive: bool) -> Tensor:
        log_mass = torch.full_like(flat[:, 0], -torch.inf)
        view = torch.arange(len(flat), device=flat.device)
        own = view if include_positive else view // views
        parts = [slice(start, start + chunk_size) for start in range(0, len(flat), chunk_size)]

        def blocks() -> Iterator[tuple[slice, slice, Tensor]]:
            """Logits of rows and columns; as they are symmetric, none below the diagonal."""
            for i, rows in enumerate(parts):
                for columns in parts[i:]:
                    logits = (flat[rows] @ flat[columns].T).mul_(beta)
                    yield rows, columns, logits.masked_fill_(own[rows, None] == own[columns], -torch.inf)

        for rows, columns, logits in blocks():
            log_mass[rows] = torch.logaddexp(log_mass[rows], logits.logsumexp(1))
            if rows != columns:
                log_mass[columns] = torch.logaddexp(log_mass[columns], logits.logsumexp(0))
        if ctx.needs_input_grad[0]:
            gradient = torch.zeros_like(flat)
            for rows, columns, logits in blocks():
                weights = (logits - log_mass[rows, None]).exp_().add_(logits.sub_(log_mass[columns]).exp_())
                gradient[rows] += weights @ flat[columns]
                if rows != columns:
                    gradient[columns] += weights.T @ flat[rows]
            ctx.save_for_backward(gradient.mul_(beta / len(flat)))
        return log_mass.mean()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():  # the gradient is a constant here: its own would be wrong, not missing
            raise RuntimeError("the exact loss can be differentiated once: take its gradient without create_graph=True")
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None, None, None
