"""What every loss promises: one call, checked input, saved state, and the same on many ranks as on one."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss
from torch_emc2.losses import ContrastiveLoss

M, D = 40, 8

MAKERS: dict[str, Callable[[], ContrastiveLoss]] = {
    "infonce": lambda: InfoNCELoss(0.1),
    "dcl": lambda: DCLLoss(0.1),
    "sogclr": lambda: SogCLRLoss(M, 0.1),
    "negative-cache": lambda: NegativeCacheLoss(M, D, 0.1, refresh_fraction=0.1),
    "emc2-encode": lambda: EMC2Loss(M, 0.1, burn_in=0.1, carry="encode", num_chains=2),
    "emc2-if-used": lambda: EMC2Loss(M, 0.1, burn_in=0.1, carry="encode_if_used"),
    "emc2-cache": lambda: EMC2Loss(M, 0.1, burn_in=0.1, carry="cache"),
    "emc2-isir": lambda: EMC2Loss(M, 0.1, carry="encode", kernel="isir", num_chains=2),
    "emc2-isir-cache": lambda: EMC2Loss(M, 0.1, kernel="isir"),
    "emc2-drop": lambda: EMC2Loss(M, 0.1, burn_in=0.1, carry="drop"),
}
STATEFUL = [name for name in MAKERS if name not in ("infonce", "dcl")]
each_loss = pytest.mark.parametrize("name", MAKERS)
each_stateful_loss = pytest.mark.parametrize("name", STATEFUL)


def table() -> Tensor:
    return torch.randn(M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def batch(step: int, size: int, own_ids: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    z = torch.randn(2, size, D, dtype=torch.float64, generator=generator)
    order = torch.randperm(M, generator=generator)
    return z[0], z[1], order[: 2 * size].view(size, 2) if own_ids else order[:size]


def step_of(loss_fn: ContrastiveLoss, step: int, size: int = 6, own_ids: bool = False) -> list[Tensor]:
    """Loss and gradients of one batch."""
    z1, z2, index = batch(step, size, own_ids)
    inputs = [tensor.requires_grad_() for tensor in (z1, z2, table())]
    loss = loss_fn(inputs[0], inputs[1], index, encode=inputs[2].__getitem__)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [loss.detach(), *(torch.zeros(1) if g is None else g for g in gradients)]


def assert_same(got: Any, want: Any, **tolerance: float) -> None:
    torch.testing.assert_close(got, want, **({"rtol": 0, "atol": 0} | tolerance))


@each_loss
def test_input_is_normalised_and_half_is_lifted(name: str) -> None:
    z1, z2, index = batch(0, 6)
    values = [MAKERS[name]()(a, b, index, encode=table().__getitem__) for a, b in ((z1, z2), (3 * z1, 0.1 * z2))]
    assert_same(values[0], values[1], rtol=1e-9, atol=1e-9)
    half = MAKERS[name]()(z1.half(), z2.half(), index, encode=table().half().__getitem__)
    assert half.dtype == torch.float32
    assert_same(half.double(), values[0], rtol=0.02, atol=0.02)


@each_loss
def test_autocast_does_not_touch_similarities(name: str) -> None:
    z1, z2, index = batch(0, 6)
    z1, z2, rows = z1.float(), z2.float(), table().float()
    plain = MAKERS[name]()(z1, z2, index, encode=rows.__getitem__)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = MAKERS[name]()(z1, z2, index, encode=rows.__getitem__)
    assert_same(inside, plain)


@each_stateful_loss
def test_encode_runs_under_the_callers_autocast(name: str) -> None:
    seen = []

    def encode(ids: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return table().float()[ids]

    loss_fn = MAKERS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(3):
            z1, z2, index = batch(step, 6)
            loss_fn(z1.float(), z2.float(), index, encode=encode)
    assert all(seen)


@each_loss
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z1": torch.zeros(6)}, ValueError, r"\(b, d\), got \(6,\)"),
        ({"z2": torch.zeros(5, D)}, ValueError, r"\(6, 8\) and \(5, 8\)"),
        (
            {"z1": torch.zeros(6, D, dtype=torch.int64), "z2": torch.zeros(6, D, dtype=torch.int64)},
            TypeError,
            "floating",
        ),
        ({"z1": torch.zeros(1, D), "z2": torch.zeros(1, D), "index": torch.tensor([0])}, ValueError, "batch of 1"),
        ({"z2": torch.zeros(6, D).index_fill(0, torch.tensor([4]), torch.nan)}, ValueError, r"z2\[4\] is not finite"),
        ({"z1": torch.zeros(6, D).index_fill(0, torch.tensor([2]), torch.inf)}, ValueError, r"z1\[2\] is not finite"),
    ],
)
def test_bad_views_are_named(name: str, change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = {"z1": torch.randn(6, D), "z2": torch.randn(6, D), "index": torch.arange(6)}
    loss_fn = MAKERS[name]()
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(error, match=message):
        loss_fn(**(good | change), encode=table().float().__getitem__)
    assert_same(loss_fn.state_dict(), before)


@each_stateful_loss
@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (None, ValueError, "needs index"),
        (torch.arange(5), ValueError, r"index must be \(6,\), or \(6, 2\).*got \(5,\)"),
        (torch.arange(6.0), TypeError, "integers, got torch.float32"),
        (torch.tensor([0, 1, 2, 3, 4, M]), IndexError, f"below num_samples={M}, got {M}"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), IndexError, "at least 0.*got -1"),
        (torch.tensor([0, 1, 2, 3, 4, 3]), ValueError, "index 3 occurs more than once"),
        (torch.arange(12).view(6, 2) % 11, ValueError, "index 0 occurs more than once"),
    ],
)
def test_bad_index_is_named(name: str, index: Tensor | None, error: type[Exception], message: str) -> None:
    loss_fn = MAKERS[name]()
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(error, match=message):
        loss_fn(torch.randn(6, D), torch.randn(6, D), index, encode=table().float().__getitem__)
    assert_same(loss_fn.state_dict(), before)


@pytest.mark.parametrize("name", ["infonce", "dcl"])
def test_stateless_losses_ignore_index(name: str) -> None:
    z1, z2, _ = batch(0, 6)
    loss_fn = MAKERS[name]()
    assert_same(loss_fn(z1, z2, torch.zeros(3)), loss_fn(z1, z2))


CASES = [(name, own_ids) for name in MAKERS for own_ids in (False, True)]


def test_state_goes_through_a_file_into_a_new_process(tmp_path: Path) -> None:
    expected = []
    for name, own_ids in CASES:
        loss_fn = MAKERS[name]()
        for step in range(5):
            step_of(loss_fn, step, own_ids=own_ids)
        torch.save(loss_fn.state_dict(), tmp_path / f"{name}-{own_ids}.pt")
        expected.append([step_of(loss_fn, step, own_ids=own_ids) for step in (5, 6)])
        fresh = step_of(MAKERS[name](), 5, own_ids=own_ids)
        differs = any(not torch.equal(a, b) for a, b in zip(fresh, expected[-1][0], strict=True))
        assert differs == (name in STATEFUL), f"{name}: does its state make a difference?"
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_contract import CASES, MAKERS, step_of
results = []
for name, own_ids in CASES:
    loss_fn = MAKERS[name]()
    loss_fn.load_state_dict(torch.load(f"{tmp_path}/{{name}}-{{own_ids}}.pt", weights_only=True))
    results.append([step_of(loss_fn, step, own_ids=own_ids) for step in (5, 6)])
torch.save(results, {str(tmp_path / "next.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_same(torch.load(tmp_path / "next.pt", weights_only=True), expected)


@each_stateful_loss
def test_evaluation_reads_and_does_not_write(name: str) -> None:
    loss_fn = MAKERS[name]()
    for step in range(3):
        step_of(loss_fn, step)
    before = copy.deepcopy(loss_fn.state_dict())
    evaluated = step_of(loss_fn.eval(), 3)
    assert_same(loss_fn.state_dict(), before)
    if name != "negative-cache":  # there the batch enters the cache before it is used
        assert_same(evaluated, step_of(loss_fn.train(), 3))


@each_stateful_loss
def test_saved_state_is_a_copy_after_loading(name: str) -> None:
    first, second = MAKERS[name](), MAKERS[name]()
    step_of(first, 0)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict())
    step_of(second, 1)
    assert_same(first.state_dict(), before)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (EMC2Loss(M), EMC2Loss(M + 1)),
        (EMC2Loss(M), EMC2Loss(M, num_chains=2)),
        (SogCLRLoss(M), SogCLRLoss(M + 1)),
        (NegativeCacheLoss(M, D), NegativeCacheLoss(M, D + 1)),
    ],
)
def test_state_of_another_size_is_refused(small: ContrastiveLoss, large: ContrastiveLoss) -> None:
    with pytest.raises(ValueError, match="the saved table is"):
        large.load_state_dict(small.state_dict())


SIZES = (4, 2)  # of the two ranks' parts: they may differ


def _rank(rank: int, folder: str) -> None:
    """Take five steps with every loss on this rank's part of each batch, and write down all that comes out."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    results = {}
    for name, own_ids in CASES:
        loss_fn, steps = MAKERS[name](), []
        for step in range(5):
            whole = batch(step, sum(SIZES), own_ids)
            z1, z2, index = (part.split(SIZES)[rank] for part in whole)
            inputs = [z1.clone().requires_grad_(), z2.clone().requires_grad_(), table().requires_grad_()]
            loss = loss_fn(inputs[0], inputs[1], index, encode=inputs[2].__getitem__)
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
            steps.append([loss.detach(), *(torch.zeros(M, D) if g is None else g for g in gradients)])
        results[name, own_ids] = steps, loss_fn.state_dict()
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=len(SIZES))  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(len(SIZES))]


@pytest.mark.parametrize(("name", "own_ids"), CASES)
def test_two_ranks_equal_one_process(name: str, own_ids: bool, two_ranks: list[Any]) -> None:
    (first, state), (second, other_state) = (rank[name, own_ids] for rank in two_ranks)
    loss_fn, close = MAKERS[name](), {"rtol": 1e-10, "atol": 1e-10}
    for step in range(5):
        loss, by_z1, by_z2, by_table = step_of(loss_fn, step, sum(SIZES), own_ids)
        a, b = first[step], second[step]
        assert_same((a[0] + b[0]) / 2, loss, **close)
        # DDP averages the ranks' gradients of shared parameters; an embedding is on one rank and the other adds
        # nothing.
        for i, whole in ((1, by_z1), (2, by_z2)):
            assert_same(torch.cat([a[i], b[i]]) / 2, whole, **close)
        assert_same((a[3] + b[3]) / 2, by_table if by_table.ndim == 2 else torch.zeros(M, D), **close)
    assert_same(state, loss_fn.state_dict(), rtol=1e-6, atol=1e-6)  # the tables are float32
    assert_same(other_state, state)
