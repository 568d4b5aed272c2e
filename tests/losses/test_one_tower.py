"""One tower, step by step, against loops: value, gradients, and tables; ids of samples and of views, hard negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from side_by_side import check_memory, follow
from slow import EMC2, Batch, InBatch, Momentum, NegativeCache, Slow, SogCLR, Uniformity

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, MomentumLoss, NegativeCacheLoss, SogCLRLoss, UniformityLoss
from torch_emc2.kernels import Isir, Metropolis
from torch_emc2.losses import ContrastiveLoss

M, B, D, STEPS = 10, 5, 5, 4
KINDS = (
    "samples",
    "views",
    "three views of samples",
    "three views",
    "repeated samples",
    "repeated views",
    "same",
    "labels",
    "hard of all",
    "hard of each",
    "hard without ids",
)


def num_views(kind: str) -> int:
    return 3 if "three" in kind else 2


def has_own_ids(kind: str) -> bool:
    return kind in ("views", "three views", "repeated views", "hard of each")


def batch_of(kind: str, step: int) -> Batch:
    """Draw a batch; what is known of two samples is known in each batch that has them."""
    generator = torch.Generator().manual_seed(step)
    views = num_views(kind)
    index = torch.randperm(M, generator=generator)[:B]
    if "repeated" in kind:
        index[3], index[4] = index[1], index[0]
    z = torch.randn(B, views, D, dtype=torch.float64, generator=generator)
    ids = views * index[:, None] + torch.arange(views) if has_own_ids(kind) else index
    slow = z + z.roll(1, 2) - z.roll(1, 0)
    batch = Batch(z[:, 0], z[:, 1], ids) if views == 2 else Batch(z, index=ids)
    batch.slow = slow if views > 2 else (slow[:, 0], slow[:, 1])
    match kind:
        case "same":
            batch.same = (index[:, None] < index) & (index[:, None] % 4 == index % 4)  # one of two directions will do
        case "labels":
            batch.labels = index % 4
        case "hard of all":
            batch.hard = torch.randn(4, D, dtype=torch.float64, generator=generator)
            batch.hard_index = torch.cat([torch.randint(M, (3,), generator=generator), index[:1]])
        case "hard of each":
            batch.hard = torch.randn(B, 3, D, dtype=torch.float64, generator=generator)
            batch.hard_index = (2 * index[:, None] + torch.tensor([1, 6, 6])) % (2 * M)
        case "hard without ids":
            batch.hard = torch.randn(B, 2, D, dtype=torch.float64, generator=generator)
    return batch


def compare(fast: ContrastiveLoss, slow: Slow, kind: str, with_encode: bool = False, **further: Any) -> float:
    """Follow both for some steps; how much gradient went to what was carried."""
    table = torch.randn(3 * M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    batches = [batch_of(kind, step) for step in range(STEPS)]
    carried = follow(fast, slow, batches, (table,) if with_encode else None, **further)
    check_memory(fast, slow)
    return sum(carried)


def settings_of(kind: str, kappa: float | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a loss and its slow version are built with."""
    entries = M * num_views(kind) if has_own_ids(kind) else M
    return {"positive_weight": kappa, "num_samples": entries}, {"positive_weight": kappa, "num_samples": (entries,) * 2}


each_kappa = pytest.mark.parametrize("kappa", [0.0, 0.7, "global"])
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kappa
@each_kind
def test_in_batch(kind: str, kappa: Any) -> None:
    given, settings = settings_of(kind, kappa)
    loss = DCLLoss if kappa == 0 else InfoNCELoss
    compare(loss(**given), InBatch(**settings), kind, tolerance=1e-10)


@each_kappa
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "labels"])
def test_momentum(kind: str, kappa: Any) -> None:
    given, settings = settings_of(kind, kappa)
    compare(MomentumLoss(queue_size=13, **given), Momentum(13, **settings), kind)


@each_kind
@each_kappa
@pytest.mark.parametrize("growth", [1.04, 1.5], ids=["β moves", "β leaps"])
def test_uniformity(kind: str, kappa: Any, growth: float) -> None:
    given, settings = settings_of(kind, kappa)
    fast, slow = UniformityLoss(gamma=0.3, **given), Uniformity(0.3, **settings)
    compare(fast, slow, kind, betas=lambda step: 2 * growth**step)


@each_kind
@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_sogclr(kind: str, kappa: float) -> None:
    given, settings = settings_of(kind, kappa)
    compare(SogCLRLoss(gamma=0.3, views=num_views(kind), **given), SogCLR(0.3, **settings), kind)


@each_kind
@pytest.mark.parametrize(("with_encode", "kappa"), [(False, "global"), (True, "global"), (True, 0.7)])
def test_negative_cache(with_encode: bool, kind: str, kappa: Any) -> None:
    given, settings = settings_of(kind, kappa)
    own = {"refresh_fraction": 0.2, "seed": 3, "views_per_sample": num_views(kind)}
    carried = compare(NegativeCacheLoss(dim=D, **own, **given), NegativeCache(**own, **settings), kind, with_encode)  # type: ignore[arg-type]
    assert (carried > 0) == with_encode


KERNELS = {"metropolis": Metropolis(0.7), "no burn-in": Metropolis(0.0), "isir": Isir()}


def compare_emc2(
    kernel: str, carry: Any, num_chains: int, kind: str, kappa: Any, gone: Sequence[int] = (), num_remembered: int = 0
) -> None:
    given, settings = settings_of(kind, kappa)
    own = {"carry": carry, "num_chains": num_chains, "num_remembered": num_remembered, "seed": 5}
    name, burn_in = kernel if kernel == "isir" else "metropolis", getattr(KERNELS[kernel], "burn_in", 0.0)
    fast, slow = EMC2Loss(kernel=KERNELS[kernel], **own, **given), EMC2(kernel=name, burn_in=burn_in, **own, **settings)
    with_encode = carry.startswith("encode")
    carried = compare(fast, slow, kind, with_encode)
    if gone:
        fast.forget(torch.tensor(gone))
        slow.forget(gone)
        carried += compare(fast, slow, kind, with_encode)
    assert float(fast.last["carried_share"]) == pytest.approx(slow.carried_share, rel=1e-6, abs=1e-9)
    assert float(fast.last["acceptance"]) == pytest.approx(slow.acceptance, rel=1e-6)
    if kernel == "isir":
        assert (carried > 0) == with_encode


@pytest.mark.parametrize("kind", ["samples", "views"])
@pytest.mark.parametrize("num_chains", [1, 3])
@pytest.mark.parametrize("carry", ["encode", "encode_if_used", "cache", "defer", "drop"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_emc2(kernel: str, carry: str, num_chains: int, kind: str) -> None:
    compare_emc2(kernel, carry, num_chains, kind, 0.0, gone=range(0, M, 3))


@pytest.mark.parametrize("kappa", [0.0, 0.7])
@each_kind
@pytest.mark.parametrize(
    ("kernel", "carry", "num_chains"),
    [("metropolis", "encode", 2), ("no burn-in", "cache", 1), ("isir", "encode_if_used", 2)],
)
def test_emc2_of_every_kind(kernel: str, carry: str, num_chains: int, kind: str, kappa: float) -> None:
    compare_emc2(kernel, carry, num_chains, kind, kappa)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "labels"])
@pytest.mark.parametrize(
    ("kernel", "carry", "num_chains", "kappa"),
    [("metropolis", "encode", 2, 0.0), ("no burn-in", "defer", 1, "global"), ("isir", "cache", 2, "global")],
)
def test_remembered_proposals(kernel: str, carry: str, num_chains: int, kappa: Any, kind: str) -> None:
    compare_emc2(kernel, carry, num_chains, kind, kappa, gone=range(0, M, 3), num_remembered=8)
