"""Rows go through a loss some at a time: the same loss, gradients and memory, and no matrix of all by all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_emc2.losses import ContrastiveLoss
from torch_emc2.losses.registry import LossContext, variants
from torch_emc2.losses.stateful import StatefulLoss

M, D, B = 60, 6, 11
NAMES = ("InfoNCE", "SogCLR, γ = 0.9", "Negative Cache", "EMC², encode_if_used", "EMC², isir, defer")
LOSSES = {name: make for name, make in variants(LossContext(M, 0.2, D, views_per_sample=2)).items() if name in NAMES}


def few_rows_at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("torch_emc2.rows._AT_ONCE", {"cpu": 1})
    monkeypatch.setattr("torch_emc2.rows._FEWEST_ROWS", rows)


def plain(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"index": torch.randperm(M, generator=generator)[:size]}


def an_id_a_view(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"index": torch.randperm(M, generator=generator)[: 2 * size].view(size, 2)}


def repeated(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"index": torch.randint(M // 3, (size,), generator=generator)}


def related(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    same = torch.rand(size, size, generator=generator) < 0.05
    return {**plain(size, generator), "labels": torch.randint(7, (size,), generator=generator), "same": same}


def hard_for_all(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    hard = torch.randn(5, D, dtype=torch.float64, generator=generator)
    return {**plain(size, generator), "hard": hard, "hard_index": torch.randint(M, (5,), generator=generator)}


def hard_of_each(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    hard = torch.randn(size, 2, D, dtype=torch.float64, generator=generator)
    return {**plain(size, generator), "hard": hard, "hard_index": torch.randint(M, (size, 2), generator=generator)}


KINDS = [plain, an_id_a_view, repeated, related, hard_for_all, hard_of_each]
Kind = Callable[[int, torch.Generator], dict[str, Tensor]]


def steps(loss_fn: ContrastiveLoss, kind: Kind) -> list[Tensor]:
    """All that three calls give, and what is left in memory."""
    generator, given = torch.Generator().manual_seed(1), []
    table = torch.randn(M, D, dtype=torch.float64, generator=generator)
    for _ in range(3):
        z = torch.randn(2, B, D, dtype=torch.float64, generator=generator).requires_grad_()
        encoded = table.clone().requires_grad_()
        beta = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        loss = loss_fn(*z, **kind(B, generator), encode=encoded.__getitem__, logit_scale=beta)
        given += [loss.detach(), *torch.autograd.grad(loss, [z, encoded, beta], materialize_grads=True)]
        given += [number for name, number in loss_fn.last.items() if name != "acceptance"]  # a mean of the parts' own
    state = loss_fn.get_extra_state() if isinstance(loss_fn, StatefulLoss) else {}
    return given + [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_parts_are_the_whole(name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steps(LOSSES[name](0), kind)
    few_rows_at_once(monkeypatch, 3)
    torch.testing.assert_close(steps(LOSSES[name](0), kind), whole, rtol=1e-6, atol=1e-7)


class _Largest(TorchDispatchMode):
    """The most numbers that a tensor made under it has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(made) if isinstance(leaf, Tensor)
        ]
        self.largest = max(self.largest, *sizes, 0)
        return made


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", [name for name in LOSSES if "Cache" not in name])  # which is rows by num_samples
def test_no_matrix_is_whole(name: str, labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    few_rows_at_once(monkeypatch, 2)
    size, d = 100, 6
    given = LossContext(2 * size, 0.2, d, views_per_sample=2)
    loss_fn, table = variants(given)[name](0), torch.randn(2 * size, d)
    for _ in range(2):
        z = torch.randn(2, size, d).requires_grad_()
        index = torch.randint(size, (size,)) if labelled else torch.randperm(2 * size).view(size, 2)
        labels = torch.randint(30, (size,)) if labelled else None
        with _Largest() as mode:
            loss_fn(*z, index, encode=table.__getitem__, labels=labels).backward()
        assert mode.largest <= 8 * size * d  # all by all is 200 × 200, and so 8 times that
