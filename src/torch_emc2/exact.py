"""The exact global contrastive loss and its gradient, for data sets small enough to enumerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.temperature import require_temperature
from torch_emc2.unit import unit_vectors

__all__ = ["global_backward", "global_contrastive_loss", "objective_mass", "two_tower_loss"]


def global_contrastive_loss(
    z: Tensor, temperature: float | Tensor, *, positive_mass: float = 0.0, chunk_size: int | None = None
) -> Tensor:
    """Global contrastive loss over all views of all samples, a scalar with exact gradient (Yau et al. 2024, eq. 1).

    ``mean_a[ -β s_pos + log(Σ_z exp(β s_z) + positive_mass Σ_p exp(β s_p)) ]``, where a runs over all views, z over all
    views of the other samples and p over the other views of a's own sample; ``s_pos`` is the mean of the ``s_p``.

    It is computed in float32 or higher precision, also under autocast, and can be differentiated once:
    ``create_graph=True`` raises RuntimeError.

    Args:
        z: (m, views, d) embeddings, m >= 2, views >= 2; normalised here. float64 stays float64.
        temperature: 1 / β, a number or a tensor without dimensions, which gets its gradient.
        positive_mass: mass of each positive in the denominator, where each negative has mass 1; 1 is the softmax over
            all.
        chunk_size: rows and columns at a time; memory beyond ``z`` and its gradient is O(chunk_size²). Default: all.

    Raises:
        ValueError: shapes or sizes do not fit, or an embedding is not finite or zero.
        TypeError: a dtype does not fit, or the temperature is not a number.
    """
    if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] < 2:
        raise ValueError(f"z must be (m, views, d) with m >= 2 and views >= 2, got {tuple(z.shape)}")
    if not z.is_floating_point():
        raise TypeError(f"z must have a floating-point dtype, got {z.dtype}")
    _require_settings(positive_mass, chunk_size)
    m, views, _ = z.shape
    with torch.autocast(z.device.type, enabled=False):
        flat = unit_vectors(z.flatten(0, 1), lambda row: f"z[{row // views}, {row % views}]")
        beta = _beta(temperature, flat)
        own = torch.arange(m * views, device=z.device).view(m, views)
        excluded = torch.stack([own.repeat_interleave(views, 1).flatten(), own.repeat(1, views).flatten()])
        log_mass = _log_mass(flat, None, beta, excluded, chunk_size)
        z = flat.view(m, views, -1)
        positives = beta * torch.stack([(z * z.roll(k, 1)).sum(2) for k in range(1, views)], 2)
        return _mean_loss(log_mass, positives.flatten(0, 1), positive_mass)


def two_tower_loss(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    directions: Directions = "both",
    positive_mass: float = 0.0,
    index: Tensor | None = None,
    y_index: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Global contrastive loss of pairs of two sides: every x with all y, every y with all x, or the mean of both.

    As `global_contrastive_loss`, except for what the rows and columns are. There is one row per pair. Equal ids are the
    same item: as a column an item counts once, by its first embedding, and it is no negative of the rows whose item it
    is paired with anywhere.

    Args:
        x: (m, d) embeddings, m >= 2; normalised here.
        y: (m, d) embeddings of x's partners.
        temperature: 1 / β, a number or a tensor without dimensions, which gets its gradient.
        directions: which side's embeddings are the rows: ``"x->y"`` means x's.
        positive_mass: mass of the positive in the denominator, where each negative has mass 1.
        index: (m,) integer ids of the items of x; by default all differ.
        y_index: (m,) integer ids of the items of y; by default ``index``.
        chunk_size: as in `global_contrastive_loss`.

    Raises:
        ValueError: shapes or sizes do not fit, an embedding is not finite or zero, or a row has no negative.
        TypeError: a dtype does not fit, or the temperature is not a number.
    """
    if x.ndim != 2 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"x and y must be (m, d) pairs with m >= 2, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.is_floating_point() or x.dtype != y.dtype:
        raise TypeError(f"x and y must share a floating-point dtype, got {x.dtype} and {y.dtype}")
    if directions not in get_args(Directions):
        raise ValueError(f"directions must be one of {', '.join(get_args(Directions))}, got {directions!r}")
    _require_settings(positive_mass, chunk_size)
    index = torch.arange(len(x), device=x.device) if index is None else index
    y_index = index if y_index is None else y_index
    for name, ids in (("index", index), ("y_index", y_index)):
        if ids.shape != x.shape[:1] or ids.is_floating_point():
            raise ValueError(f"{name} must be ({len(x)},) integers, got {tuple(ids.shape)} of {ids.dtype}")
    with torch.autocast(x.device.type, enabled=False):
        x, y = unit_vectors(x, lambda row: f"x[{row}]"), unit_vectors(y, lambda row: f"y[{row}]")
        beta = _beta(temperature, x)
        positives = beta * (x * y).sum(1, keepdim=True)
        sides = {"x->y": (x, y, index, y_index), "y->x": (y, x, y_index, index)}
        losses = []
        for rows, columns, row_ids, column_ids in sides.values() if directions == "both" else [sides[directions]]:
            first, excluded = _items(row_ids, column_ids)
            log_mass = _log_mass(rows, columns[first], beta, excluded, chunk_size)
            losses.append(_mean_loss(log_mass, positives, positive_mass))
        return torch.stack(losses).mean()


def global_backward(
    embed: Callable[[Tensor], Tensor],
    num_samples: int,
    temperature: float | Tensor,
    *,
    positive_mass: float = 0.0,
    embed_chunk_size: int = 256,
    chunk_size: int = 4096,
) -> Tensor:
    """Add the exact gradient of the global loss to the ``.grad`` of all parameters behind ``embed`` and
    ``temperature``, and return the loss.

    This takes two passes, so that memory does not hold the graph of the whole data set: embed without graph, take the
    gradient at the embeddings, then embed again chunk by chunk and propagate the gradient back.

    Args:
        embed: function from ids (k,) to embeddings (k, views, d), which must be the same for the same ids, whatever
            chunk they come in (no batch norm in training mode).
        num_samples: size m of the data set; ids are 0 … m - 1.
        temperature: as in `global_contrastive_loss`.
        positive_mass: as in `global_contrastive_loss`.
        embed_chunk_size: samples embedded at a time.
        chunk_size: as in `global_contrastive_loss`.
    """
    chunks = torch.split(torch.arange(num_samples), embed_chunk_size)
    with torch.no_grad():
        z = torch.cat([embed(ids) for ids in chunks])
    z.requires_grad_()
    loss = global_contrastive_loss(z, temperature, positive_mass=positive_mass, chunk_size=chunk_size)
    torch.autograd.backward(loss)
    assert z.grad is not None
    for ids in chunks:
        torch.autograd.backward(embed(ids), z.grad[ids])
    return loss.detach()


def objective_mass(positive_weight: float | Literal["global"] | None, num_samples: int, batch_size: int) -> float:
    """Return the ``positive_mass`` of the objective that losses with this κ estimate: κ N / n, 1 for ``"global"``.

    Args:
        positive_weight: κ, with the n negatives that a row has in a batch; None for 0, the paper's objective.
        num_samples: size of the data set, where a row has N negatives.
        batch_size: samples per batch.
    """
    if positive_weight == "global":
        return 1.0
    return (positive_weight or 0.0) * (num_samples - 1) / (batch_size - 1)


def _require_settings(positive_mass: float, chunk_size: int | None) -> None:
    if not 0 <= positive_mass < math.inf:
        raise ValueError(f"positive_mass must be a number from 0, got {positive_mass}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _beta(temperature: float | Tensor, like: Tensor) -> Tensor:
    """Return 1 / temperature as a tensor, through which the temperature gets its gradient."""
    if isinstance(temperature, Tensor) and temperature.ndim:
        raise ValueError(f"temperature must be a number or a tensor without dimensions, got {tuple(temperature.shape)}")
    require_temperature(temperature.item() if isinstance(temperature, Tensor) else temperature)
    return 1 / torch.as_tensor(temperature, dtype=like.dtype, device=like.device)


def _items(row_ids: Tensor, column_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return each column item's first place, and rows and items (2, k) that are paired somewhere."""
    place = torch.arange(len(column_ids), device=column_ids.device)
    _, row_item = torch.unique(row_ids, return_inverse=True)
    items, item = torch.unique(column_ids, return_inverse=True)
    first = place.new_full(items.shape, len(place)).scatter_reduce(0, item, place, "amin")
    row_items, paired = torch.unique(torch.stack([row_item, item]), dim=1)  # in the order of the rows' items
    count = row_items.bincount()
    by_row_item = paired.split(count.tolist())
    columns = torch.cat([by_row_item[k] for k in row_item.tolist()])
    return first, torch.stack([place.repeat_interleave(count[row_item]), columns])


def _mean_loss(log_mass: Tensor, positives: Tensor, positive_mass: float) -> Tensor:
    """Mean over rows, given the log mass of their negatives (n,) and the logits of their positives (n, p)."""
    weight = positives.new_tensor(positive_mass).log()
    return (torch.logaddexp(log_mass, positives.logsumexp(1) + weight) - positives.mean(1)).mean()


def _log_mass(rows: Tensor, columns: Tensor | None, beta: Tensor, excluded: Tensor, chunk_size: int | None) -> Tensor:
    """Return log Σ exp(β s) of each row over the columns, except for the pairs ``excluded``.

    If ``columns`` is None, the rows are compared with each other.
    """
    size = chunk_size or max(len(rows), 0 if columns is None else len(columns))
    log_mass: Tensor = _LogMass.apply(rows, columns, beta, excluded, size)
    lone = log_mass.isneginf().nonzero()
    if len(lone):
        raise ValueError(f"row {int(lone[0])} has no negative: all items are paired with it")
    return log_mass


class _LogMass(torch.autograd.Function):
    """The log mass of rows, with its gradient in rows, columns and β. The backward pass computes the blocks again.

    Without columns, rows are compared with each other, and a block stands for its mirror image too.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor | None, beta: Tensor, excluded: Tensor, chunk_size: int
    ) -> Tensor:
        log_mass = torch.full_like(rows[:, 0], -torch.inf)
        for i, j, logits in _blocks(rows, columns, beta, excluded, chunk_size):
            log_mass[i] = torch.logaddexp(log_mass[i], logits.logsumexp(1))
            if columns is None and i != j:
                log_mass[j] = torch.logaddexp(log_mass[j], logits.logsumexp(0))
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(rows, columns, beta, excluded, log_mass)
        return log_mass

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradient is a constant here: a second one would be wrong, not missing
            raise RuntimeError("the exact loss can be differentiated once: take its gradient without create_graph=True")
        rows, columns, beta, excluded, log_mass = ctx.saved_tensors
        (scale,) = outer
        mirrored = columns is None
        columns = rows if mirrored else columns
        at_rows = torch.zeros_like(rows)
        at_columns = at_rows if mirrored else torch.zeros_like(columns)
        with torch.autocast(rows.device.type, enabled=False):
            for i, j, logits in _blocks(rows, None if mirrored else columns, beta, excluded, ctx.chunk_size):
                weights = (logits - log_mass[i, None]).exp_().mul_(scale[i, None])
                if mirrored:
                    weights.addcmul_(logits.sub_(log_mass[j]).exp_(), scale[j])
                at_rows[i] += weights @ columns[j]
                if not mirrored or i != j:
                    at_columns[j] += weights.T @ rows[i]
            at_beta = (rows * at_rows).sum() / (2 if mirrored else 1)
            return beta * at_rows, None if mirrored else beta * at_columns, at_beta, None, None


def _blocks(
    rows: Tensor, columns: Tensor | None, beta: Tensor, excluded: Tensor, chunk_size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield logits of some rows and columns, -inf where excluded; without columns, none below the diagonal."""
    across = rows if columns is None else columns
    for i in _chunks(rows, chunk_size):
        of_rows = excluded[:, (excluded[0] >= i.start) & (excluded[0] < i.stop)]
        for j in _chunks(across, chunk_size):
            if columns is None and j.start < i.start:
                continue
            here = of_rows[:, (of_rows[1] >= j.start) & (of_rows[1] < j.stop)]
            logits = (beta * rows[i]) @ across[j].T
            logits[here[0] - i.start, here[1] - j.start] = -torch.inf
            yield i, j, logits


def _chunks(of: Tensor, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(of), size)]
