"""What losses of both geometries do in some steps, on a rank's part of each batch or on the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from slow import Batch
from torch import Tensor

from torch_emc2 import (
    DCLLoss,
    EMC2Loss,
    InfoNCELoss,
    MomentumLoss,
    NegativeCacheLoss,
    SogCLRLoss,
    Temperature,
    UniformityLoss,
)
from torch_emc2.kernels import Metropolis
from torch_emc2.losses import ContrastiveLoss

X, Y, D, STEPS = 13, 12, 5, 3
NO_BURN_IN = Metropolis(0.0)

# Of each case the number of towers, what is peculiar of its batches, and the loss.
CASES: dict[str, tuple[int, str, Callable[[], ContrastiveLoss]]] = {
    "infonce": (
        2,
        "hard of all",
        lambda: InfoNCELoss(0.2, towers=2, num_samples=(X, Y), positive_weight="global"),
    ),
    "infonce, learnt": (2, "labels", lambda: InfoNCELoss(Temperature(0.2).double(), towers=2)),
    "dcl, y->x": (2, "same", lambda: DCLLoss(0.2, towers=2, directions="y->x")),
    "uniformity": (2, "hard of each", lambda: UniformityLoss(0.2, gamma=0.3, towers=2, positive_weight=0.5)),
    "momentum": (
        2,
        "hard of each",
        lambda: MomentumLoss(0.2, queue_size=5, towers=2, num_samples=(X, Y), positive_weight="global"),
    ),
    "momentum, x->y": (2, "same", lambda: MomentumLoss(0.2, queue_size=20, towers=2, directions="x->y")),
    "sogclr": (2, "labels", lambda: SogCLRLoss((X, Y), 0.2, 0.5, towers=2, positive_weight=0.5)),
    "sogclr, keyed": (2, "items", lambda: SogCLRLoss(None, 0.2, 0.5, towers=2)),
    "negative cache": (2, "hard of each", lambda: NegativeCacheLoss((X, Y), D, 0.2, refresh_fraction=0.2, towers=2)),
    "emc2, encode": (
        2,
        "hard of all",
        lambda: EMC2Loss((X, Y), 0.2, kernel=NO_BURN_IN, carry="encode", num_chains=2, towers=2),
    ),
    "emc2, encode if used": (
        2,
        "same",
        lambda: EMC2Loss((X, Y), 0.2, kernel=NO_BURN_IN, carry="encode_if_used", towers=2, positive_weight=0.3),
    ),
    "emc2, cache": (2, "hard of each", lambda: EMC2Loss((X, Y), 0.2, kernel=NO_BURN_IN, towers=2)),
    "isir, encode": (
        2,
        "hard of each",
        lambda: EMC2Loss((X, Y), 0.2, kernel="isir", carry="encode", towers=2, positive_weight=1),
    ),
    "isir, cache, keyed": (2, "labels", lambda: EMC2Loss(None, 0.2, kernel="isir", num_chains=2, towers=2)),
    "isir, encode, remembered": (
        2,
        "hard of each",
        lambda: EMC2Loss(
            (X, Y), 0.2, kernel="isir", carry="encode", num_remembered=9, towers=2, positive_weight="global"
        ),
    ),
    "one tower: infonce": (1, "hard of each", lambda: InfoNCELoss(0.2)),
    "one tower: uniformity": (1, "labels", lambda: UniformityLoss(0.2, gamma=0.3)),
    "one tower: momentum": (1, "views", lambda: MomentumLoss(0.2, queue_size=20)),
    "one tower: momentum, shared ids": (1, "hard of all", lambda: MomentumLoss(0.2, queue_size=9, positive_weight=0.3)),
    "one tower: sogclr": (1, "labels", lambda: SogCLRLoss(X, 0.2, 0.5, views=3)),
    "one tower: negative cache": (
        1,
        "views",
        lambda: NegativeCacheLoss(3 * X, D, 0.2, refresh_fraction=0.1, views_per_sample=3),
    ),
    "one tower: emc2, cache": (
        1,
        "hard of all",
        lambda: EMC2Loss(X, 0.2, kernel=NO_BURN_IN, num_chains=2, positive_weight=0.3),
    ),
    "one tower: emc2, remembered": (
        1,
        "hard of all",
        lambda: EMC2Loss(None, 0.2, kernel=NO_BURN_IN, carry="defer", num_remembered=6),
    ),
    "one tower: isir, encode": (1, "views", lambda: EMC2Loss(3 * X, 0.2, kernel="isir", carry="encode")),
}


def parts_of(towers: int, kind: str, step: int, sizes: tuple[int, ...]) -> list[Batch]:
    """What each rank is called with. Ids come again, on other ranks too."""
    generator, size = torch.Generator().manual_seed(step), sum(sizes)
    z = torch.randn(size, 3, D, dtype=torch.float64, generator=generator)
    slow = z + 0.3 * torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(100 + step))
    index = torch.randperm(Y, generator=generator)[:size]
    if towers == 1:
        index[-1] = index[0]
        ids = 3 * index[:, None] + torch.arange(3) if kind == "views" else index
        whole = Batch(z, index=ids)
    else:
        y_index = Y - 1 - index
        y_index[-1], index[-2] = y_index[0], index[1]
        whole = Batch(z[:, 0], z[:, 1], index, y_index)
    parts = [
        Batch(
            *(None if each is None else each[part] for each in (whole.x, whole.y, whole.index, whole.y_index)),
            slow=slow[part] if towers == 1 else (slow[part, 0], slow[part, 1]),
        )
        for part in torch.arange(size).split(sizes)
    ]
    same = torch.rand(size, size, generator=generator) < 0.1
    hard = torch.randn(size, 3, D, dtype=torch.float64, generator=generator)
    hard_index = torch.randint(Y, (size, 3), generator=generator)
    first = 0
    for rank, part in enumerate(parts):
        own = slice(first, first := first + sizes[rank])
        match kind:
            case "same":
                part.same = same[own, own]
            case "labels":
                part.labels = torch.arange(size)[own] % 3
            case "hard of all":  # of a sample none, one or two
                part.hard = torch.cat([hard[i, : i % 3] for i in range(own.start, own.stop)])
                part.hard_index = torch.cat([hard_index[i, : i % 3] for i in range(own.start, own.stop)])
            case "hard of each":
                part.hard, part.hard_index = hard[own], hard_index[own]
    return parts


def together(parts: list[Batch]) -> Batch:
    """The whole batch, as one process is called with it."""
    fields: dict[str, Any] = {}
    for name in vars(parts[0]):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], tuple):
            fields[name] = tuple(map(torch.cat, zip(*values, strict=True)))
        elif values[0] is not None:
            fields[name] = torch.block_diag(*values) > 0 if name == "same" else torch.cat(values)
    return Batch(**fields)


Step = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]
"""Loss and gradients: of embeddings, which are a rank's own, and of parameters; and numbers for logs, as of these."""


def train(name: str, sizes: tuple[int, ...], rank: int | None = None) -> tuple[list[Step], Any]:
    """Some steps on a rank's part of each batch, or on the whole of it, and the state after them."""
    towers, kind, make = CASES[name]
    loss_fn, steps = make(), []
    generator = torch.Generator().manual_seed(9)
    tables = [torch.randn(3 * X, D, dtype=torch.float64, generator=generator) for _ in range(towers)]
    beta = torch.tensor(3.0, dtype=torch.float64)
    for step in range(STEPS):
        parts = parts_of(towers, kind, step, sizes)
        batch = (together(parts) if rank is None else parts[rank]).with_gradient()
        encoders = [table.requires_grad_().__getitem__ for table in tables]
        scale = {} if list(loss_fn.parameters()) else {"logit_scale": beta.requires_grad_()}
        loss = batch.call(loss_fn, encode=tuple(encoders) if towers == 2 else encoders[0], **scale)
        leaves, learnt = batch.leaves(), [*tables, *loss_fn.parameters(), *scale.values()]
        gradients = torch.autograd.grad(loss, [*leaves, *learnt], materialize_grads=True)
        learnt_and_told = *gradients[len(leaves) :], *(loss_fn.last[name] for name in sorted(loss_fn.last))
        steps.append((loss.detach(), gradients[: len(leaves)], learnt_and_told))
    return steps, loss_fn.state_dict()


def mean_over_ranks(steps: Sequence[Step]) -> Step:
    """What one process would have: an embedding is on one rank, and the others add nothing."""
    losses, embeddings, parameters = zip(*steps, strict=True)
    return (
        torch.stack(losses).mean(),
        tuple(torch.cat(parts) / len(steps) for parts in zip(*embeddings, strict=True)),
        tuple(torch.stack(parts).mean(0) for parts in zip(*parameters, strict=True)),
    )
