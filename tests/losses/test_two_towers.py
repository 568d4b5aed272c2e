"""Two towers, step by step, against loops with a dictionary of chains a direction: value, gradients, and tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from side_by_side import check_memory, follow
from slow import DIRECTIONS, EMC2, Batch, InBatch, Momentum, NegativeCache, Slow, SogCLR, Uniformity
from torch import Tensor

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, MomentumLoss, NegativeCacheLoss, SogCLRLoss, UniformityLoss
from torch_emc2.kernels import Isir, Metropolis
from torch_emc2.losses import ContrastiveLoss

B, D, STEPS = 6, 5, 4
X, Y = 13, 12  # items of the sides
# An item of x with three of y, an item of y with three of x, and couples; y's ids are not those of x.
PAIRS = [(0, 11), (0, 10), (0, 9), (1, 8), (2, 8), (3, 8), *((4 + i, 7 - i) for i in range(8))]
COUPLES = PAIRS[6:]
CROSSED = [(i % 4, i % 7) for i in range(14)]  # what is a pair in one batch is known in no batch without it
KINDS = ("couples", "items", "crossed", "same", "labels", "hard of all", "hard of each", "hard without ids")


def batch_of(kind: str, step: int) -> Batch:
    """Draw a batch; but for "crossed" ones what is known of two items is known in each batch that has them."""
    generator = torch.Generator().manual_seed(step)
    pairs = CROSSED if kind == "crossed" else COUPLES if kind in ("couples", "labels") else PAIRS
    chosen = torch.tensor(pairs)[torch.randperm(len(pairs), generator=generator)[:B]]
    index, y_index = chosen.unbind(1)
    x, y = torch.randn(2, B, D, dtype=torch.float64, generator=generator).unbind()
    batch = Batch(x, y, index, y_index, slow=(x + y.roll(1, 1), y - x.roll(1, 0)))
    match kind:
        case "same":  # beside its own an x has a y of another couple's
            batch.same = (index[:, None] >= 4) & (index[:, None] % 5 == y_index % 5)
        case "labels":
            batch.labels = index % 4
        case "hard of all":
            batch.hard = torch.randn(4, D, dtype=torch.float64, generator=generator)
            batch.hard_index = torch.cat([torch.randint(8, (3,), generator=generator), y_index[:1]])
        case "hard of each":
            batch.hard = torch.randn(B, 3, D, dtype=torch.float64, generator=generator)
            batch.hard_index = torch.where(index < 4, 7 - index, y_index)[:, None] % 8
            batch.hard_index = (batch.hard_index + torch.tensor([0, 2, 2])) % 8
        case "hard without ids":
            batch.hard = torch.randn(B, 2, D, dtype=torch.float64, generator=generator)
    return batch


def tables() -> tuple[Tensor, Tensor]:
    """Embeddings of x's and y's items by id."""
    generator = torch.Generator().manual_seed(9)
    return tuple(torch.randn(n, D, dtype=torch.float64, generator=generator) for n in (X, Y))  # type: ignore[return-value]


def compare(fast: ContrastiveLoss, slow: Slow, kind: str, with_encode: bool = False, **further: Any) -> float:
    """Follow both for some steps. What is carried of a direction is of its columns' side."""
    batches = [batch_of(kind, step) for step in range(STEPS)]
    carried = follow(fast, slow, batches, tables() if with_encode else None, **further)
    check_memory(fast, slow)
    for number in range(2) if with_encode else ():
        if slow.directions not in ("both", DIRECTIONS[1 - number]):
            assert carried[number] == 0
    return sum(carried)


def settings_of(kappa: float | str, directions: str) -> dict[str, Any]:
    """What a loss and its slow version are built with."""
    return {"positive_weight": kappa, "towers": 2, "directions": directions, "num_samples": (X, Y)}


# Hard negatives are of y's side.
CASES = [(kind, way) for kind in KINDS for way in ("both", *DIRECTIONS) if not (way == "y->x" and "hard" in kind)]

each_direction = pytest.mark.parametrize("directions", ["both", *DIRECTIONS])


@pytest.mark.parametrize("kappa", [0.0, 0.7, "global"])
@pytest.mark.parametrize(("kind", "directions"), CASES)
def test_in_batch(kind: str, directions: Any, kappa: Any) -> None:
    settings = settings_of(kappa, directions)
    loss = DCLLoss if kappa == 0 else InfoNCELoss
    compare(loss(**settings), InBatch(**settings), kind, tolerance=1e-10)


@pytest.mark.parametrize("kappa", [0.0, 0.7, "global"])
@pytest.mark.parametrize(("kind", "directions"), [case for case in CASES if case[0] != "labels"])
def test_momentum(kind: str, directions: Any, kappa: Any) -> None:
    settings = settings_of(kappa, directions)
    compare(MomentumLoss(queue_size=9, **settings), Momentum(9, **settings), kind)


@pytest.mark.parametrize("growth", [1.04, 1.5], ids=["β moves", "β leaps"])
@pytest.mark.parametrize("kappa", [0.0, 0.7])
@pytest.mark.parametrize(("kind", "directions"), CASES)
def test_uniformity(kind: str, directions: Any, kappa: Any, growth: float) -> None:
    settings = settings_of(kappa, directions)
    fast, slow = UniformityLoss(gamma=0.3, **settings), Uniformity(0.3, **settings)
    compare(fast, slow, kind, betas=lambda step: 2 * growth**step)


@pytest.mark.parametrize(
    ("kind", "kappa", "directions"),
    [*((kind, 0.7, "both") for kind in KINDS), *(("items", 0.0, directions) for directions in DIRECTIONS)],
)
@pytest.mark.parametrize("gamma", [0.3, lambda call: 1 / (1 + call)], ids=["constant", "schedule"])
def test_sogclr(gamma: Any, kind: str, kappa: Any, directions: Any) -> None:
    settings = settings_of(kappa, directions)
    compare(SogCLRLoss(gamma=gamma, **settings), SogCLR(gamma, **settings), kind)


@pytest.mark.parametrize(
    ("kind", "kappa", "directions"),
    [*((kind, "global", "both") for kind in KINDS), *(("items", 0.7, directions) for directions in DIRECTIONS)],
)
@pytest.mark.parametrize("with_encode", [False, True])
def test_negative_cache(with_encode: bool, kind: str, kappa: Any, directions: Any) -> None:
    settings = settings_of(kappa, directions)
    fast = NegativeCacheLoss(dim=D, refresh_fraction=0.2, seed=3, **settings)
    carried = compare(fast, NegativeCache(0.2, seed=3, **settings), kind, with_encode)
    assert (carried > 0) == with_encode


KERNELS = {"metropolis": Metropolis(0.5), "no burn-in": Metropolis(0.0), "isir": Isir()}


def compare_emc2(
    kernel: str, carry: Any, num_chains: int, kind: str, kappa: Any, directions: Any, num_remembered: int = 0
) -> None:
    own = {"carry": carry, "num_chains": num_chains, "num_remembered": num_remembered, "seed": 5}
    settings = {**own, **settings_of(kappa, directions)}
    name, burn_in = kernel if kernel == "isir" else "metropolis", getattr(KERNELS[kernel], "burn_in", 0.0)
    with_encode = carry.startswith("encode")
    slow = EMC2(kernel=name, burn_in=burn_in, **settings)
    carried = compare(EMC2Loss(kernel=KERNELS[kernel], **settings), slow, kind, with_encode)
    if kernel == "isir":
        assert (carried > 0) == with_encode


@each_direction
@pytest.mark.parametrize("num_chains", [1, 3])
@pytest.mark.parametrize("carry", ["encode", "encode_if_used", "cache", "defer", "drop"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_emc2(kernel: str, carry: str, num_chains: int, directions: str) -> None:
    compare_emc2(kernel, carry, num_chains, "items", 0.0, directions)


@pytest.mark.parametrize("kappa", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kernel", "carry", "num_chains"),
    [
        ("metropolis", "encode", 2),
        ("no burn-in", "cache", 1),
        ("no burn-in", "encode_if_used", 1),
        ("isir", "cache", 2),
    ],
)
def test_emc2_of_every_kind(kernel: str, carry: str, num_chains: int, kind: str, kappa: Any) -> None:
    compare_emc2(kernel, carry, num_chains, kind, kappa, "both")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "labels"])
@pytest.mark.parametrize(
    ("kernel", "carry", "num_chains", "kappa"),
    [("metropolis", "encode", 2, 0.0), ("no burn-in", "defer", 1, "global"), ("isir", "cache", 2, "global")],
)
def test_remembered_proposals(kernel: str, carry: str, num_chains: int, kappa: Any, kind: str) -> None:
    compare_emc2(kernel, carry, num_chains, kind, kappa, "both", num_remembered=8)
