"""EMC²: what it asks of ``encode``, draws, saves and forgets; its numbers are in test_one_tower and test_two_towers."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slow import EMC2, Batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_emc2 import EMC2Loss
from torch_emc2.batch import gather_batch
from torch_emc2.geometry import Contrast
from torch_emc2.kernels import Draws, Isir, Metropolis, Move, Visit
from torch_emc2.losses.draws import BatchDraws
from torch_emc2.settings.losses import Carry
from torch_emc2.validation import validate_inputs

M, B, D = 24, 5, 6
POLICIES = ("encode", "encode_if_used", "cache", "defer", "drop")


def batches(count: int, own_chains: bool, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        index = torch.randperm(M, generator=generator)[:B]
        z1, z2 = torch.randn(2, B, D, dtype=torch.float64, generator=generator).unbind()
        out.append((z1, z2, torch.stack([2 * index, 2 * index + 1], 1) if own_chains else index))
    return out


@pytest.mark.parametrize("own_chains", [False, True])
def test_encode_if_used_is_asked_for_what_is_used_alone(own_chains: bool) -> None:
    """Used are those that the slow version's gradient reaches."""
    table = torch.randn(2 * M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    fast = EMC2Loss(2 * M, 0.2, kernel=Metropolis(0.3), num_chains=2, carry="encode_if_used", seed=5)
    slow = EMC2(burn_in=0.3, num_chains=2, carry="encode_if_used", seed=5)
    all_carried, all_asked = 0, 0
    for z1, z2, index in batches(12, own_chains, seed=2):
        asked: list[int] = []
        carried = fast.chains.ids.data[index.flatten()]

        def encode(ids: Tensor, asked: list[int] = asked) -> Tensor:
            asked += ids.tolist()
            return table[ids]

        fast(z1, z2, index, encode=encode)
        batch, beta = Batch(z1.requires_grad_(), z2, index), torch.tensor(1 / 0.2, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(slow(batch, beta, (table, table)), table, materialize_grads=True)
        assert sorted(asked) == gradient.any(1).nonzero()[:, 0].tolist()
        all_carried += len(carried[carried >= 0].unique())
        all_asked += len(asked)
    assert 0 < all_asked < all_carried


@pytest.mark.parametrize("own_chains", [False, True])
@pytest.mark.parametrize("kernel", ["metropolis", "isir"])
@pytest.mark.parametrize("carry", POLICIES)
def test_shares_of_a_row_sum_to_one(
    carry: Carry, kernel: str, own_chains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_fn = EMC2Loss(2 * M, 0.1, num_chains=2, carry=carry, kernel=kernel)
    shares, move = [], type(loss_fn.kernel).move

    def spy(self: Metropolis | Isir, visit: Visit, draws: Draws) -> Move:
        moved = move(self, visit, draws)  # type: ignore[arg-type]
        shares.append((visit.logits == -torch.inf, moved.weights.clone(), moved.carried_weights))
        return moved

    monkeypatch.setattr(type(loss_fn.kernel), "move", spy)
    for z1, z2, index in batches(10, own_chains, seed=0):
        loss_fn(z1, z2, index, encode=lambda ids: torch.randn(len(ids), D, dtype=torch.float64))
    assert len(shares) == 10
    for own, in_batch, at_carried in shares:
        total = in_batch.sum(1) + at_carried.sum(1) / 2
        torch.testing.assert_close(total, torch.ones(2 * B, dtype=torch.float64))
        assert own.sum() == 2 * B * 2
        assert (in_batch[own] == 0).all()


def test_a_stale_score_does_not_hold_its_chain() -> None:
    loss_fn = EMC2Loss(M, 0.1, kernel=Metropolis(0.0), carry="encode_if_used")
    index, rows = torch.arange(B), torch.randn(M, D)
    loss_fn.chains.write(index, torch.full((B, 1), M - 1), torch.full((B, 1), 1e6))  # which nothing can reach
    z = torch.randn(2, B, D)
    loss_fn(*z, index, encode=rows.__getitem__)
    kept = BatchDraws(contrast(*z), seed=0, call=0).chances(1).keep_view[:, 0]
    fresh = F.normalize(z[kept, index], dim=1) @ F.normalize(rows[-1], dim=0)
    assert (loss_fn.chains.ids.data[:B, 0] == M - 1).all()
    torch.testing.assert_close(loss_fn.chains.similarities.data[:B, 0], fresh)


def test_chains_without_embeddings_are_no_cache() -> None:
    first, cache = EMC2Loss(M, carry="encode"), EMC2Loss(M, carry="cache")
    cache.load_state_dict(first.state_dict())  # none yet, and so no chain
    z1, z2, index = batches(1, own_chains=False, seed=0)[0]
    first(z1, z2, index, encode=lambda ids: torch.randn(len(ids), D))
    with pytest.raises(ValueError, match='chains and no embeddings for carry="cache"'):
        cache.load_state_dict(first.state_dict())
    assert (cache.chains.ids.data < 0).all()


@pytest.mark.parametrize("num_samples", [None, M])
def test_a_cache_of_another_width_is_loaded(num_samples: int | None) -> None:
    saved, loss_fn = EMC2Loss(num_samples, kernel=Metropolis(0.1)), EMC2Loss(num_samples, kernel=Metropolis(0.1))
    for z1, z2, index in batches(3, own_chains=False, seed=0):
        saved(z1, z2, index)
        loss_fn(z1[:, :-2], z2[:, :-2], index)
    loss_fn.load_state_dict(saved.state_dict())
    for z1, z2, index in batches(4, own_chains=False, seed=1):
        got, want = (torch.autograd.grad(each(z1.requires_grad_(), z2, index), z1) for each in (loss_fn, saved))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(loss_fn.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_a_batch_of_another_width_changes_nothing() -> None:
    loss_fn = EMC2Loss(M)
    loss_fn(*torch.randn(2, B, D), torch.arange(B))
    before = loss_fn.chains.ids.data.clone()
    with pytest.raises(ValueError, match=rf"x and y must be \(b, {D}\) as the cached"):
        loss_fn(*torch.randn(2, B, D + 1), torch.arange(B))
    assert torch.equal(loss_fn.chains.ids.data, before)


def test_labels_are_not_known_of_what_is_remembered() -> None:
    loss_fn = EMC2Loss(10, num_remembered=4)
    x, y, index = torch.randn(4, 3), torch.randn(4, 3), torch.arange(4)
    loss_fn(x, y, index)
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(ValueError, match="num_remembered=0"):
        loss_fn(x, y, index, labels=index % 2)
    torch.testing.assert_close(loss_fn.state_dict(), before, rtol=0, atol=0)


def test_kappa_is_the_share_that_the_whole_data_gives_it_with_any_number_of_proposals() -> None:
    """All embeddings equal: with κ = "global" the positive is one of all."""
    size, ones = 100, torch.ones(4, 3)
    for num_remembered in (0, 50):
        loss_fn = EMC2Loss(size, kernel="isir", positive_weight="global", num_remembered=num_remembered)
        for _ in range(2):
            for index in torch.arange(size).split(4):
                loss = loss_fn(ones, ones, index)
        assert float(loss) == pytest.approx(math.log(1 + 1 / (2 * size - 2)), rel=1e-3)


@pytest.mark.parametrize(("kernel", "temperature"), [("metropolis", 0.2), ("isir", 1.0)])
def test_noise_goes_on_with_the_calls_and_starts_with_the_seed(kernel: str, temperature: float) -> None:
    z, index, ends = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0)), torch.arange(B), []
    for seed, calls in ((0, 0), (0, 1), (1, 0)):
        loss_fn = EMC2Loss(M, temperature, kernel=kernel, num_chains=20)
        loss_fn.load_state_dict({"_extra_state": loss_fn.get_extra_state() | {"seed": seed, "calls": calls}})
        loss_fn(*z, index)
        assert (loss_fn.seed, loss_fn._calls) == (seed, calls + 1)
        ends.append(loss_fn.chains.ids.data[:B].clone())
    for one, other in ((0, 1), (0, 2), (1, 2)):  # some agree by chance
        assert (ends[one] == ends[other]).float().mean() < 0.9


def test_acceptance_and_carried_share_are_those_of_the_slow_walk() -> None:
    """At one temperature so high that a chain accepts all, and one so low that it accepts its best alone."""
    z1, z2, index = batches(1, own_chains=False, seed=0)[0]
    loss_fn = EMC2Loss(M, 1e6, kernel=Metropolis(0.0))
    loss_fn(z1, z2, index)
    assert float(loss_fn.last["acceptance"]) > 0.99
    assert float(loss_fn.last["carried_share"]) == 0
    stuck = EMC2Loss(M, 1.0, kernel=Metropolis(0.25), carry="drop", num_chains=2)
    stuck.chains.write(index, torch.full((B, 2), M - 1), torch.tensor([[1e9, -torch.inf]]).expand(B, 2))
    stuck(z1, z2, index)
    assert float(stuck.last["carried_share"]) == pytest.approx(0.5)  # of each row's two chains one never moves


@pytest.mark.parametrize("key", [1, 0x9E3779B97F4A7C15 - 2**64], ids=["dense", "hash"])
@pytest.mark.parametrize("kernel", ["metropolis", "isir"])
@pytest.mark.parametrize("carry", POLICIES)
@pytest.mark.parametrize("own_chains", [False, True])
def test_keys_equal_a_fixed_table(own_chains: bool, carry: Carry, kernel: str, key: int, tmp_path: Path) -> None:
    """Bit for bit, with samples forgotten and the state saved on the way."""
    key_of = torch.arange(2 * M) * key  # wraps
    id_of = {each: i for i, each in enumerate(key_of.tolist())}
    table = torch.randn(2 * M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fixed, keyed = (EMC2Loss(size, 0.2, carry=carry, kernel=kernel) for size in (2 * M, None))
    for step, (z1, z2, index) in enumerate(batches(12, own_chains, seed=4)):
        if step == 5:
            fixed.forget(torch.arange(0, 2 * M, 3))
            keyed.forget(key_of[::3])
        if step in (3, 8):
            torch.save(keyed.state_dict(), tmp_path / "state.pt")
            keyed = EMC2Loss(None, 0.2, carry=carry, kernel=kernel)
            keyed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        results = []
        for loss_fn, ids in ((fixed, index), (keyed, key_of[index])):
            a, b, rows = inputs = [tensor.clone().requires_grad_() for tensor in (z1, z2, table)]

            def encode(ids: Tensor, rows: Tensor = rows, fixed: bool = loss_fn is fixed) -> Tensor:
                return rows[ids] if fixed else rows[[id_of[each] for each in ids.tolist()]]

            loss = loss_fn(a, b, ids, encode=encode)
            results.append([loss.detach(), torch.autograd.grad(loss, inputs, materialize_grads=True)])
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)

    state = keyed.get_extra_state()
    ids = torch.tensor([id_of[each] for each in state["keys"].tolist()])
    carried = fixed.chains.ids.data[ids].long()
    assert torch.equal(state["chains"]["ids"], torch.where(carried < 0, -1, key_of[carried]))
    if fixed.chains.similarities is not None:
        assert torch.equal(state["chains"]["similarities"], fixed.chains.similarities.data[ids])
    assert (fixed.chains.ids.data >= 0).sum() == (state["chains"]["ids"] != -1).sum()
    assert {len(each) for each in (state["keys"], *state["chains"].values())} == {len(ids)}
    if carry in ("cache", "defer"):
        assert torch.equal(state["embeddings"], fixed.sides[0].embeddings.data[ids])
    if carry == "defer":
        assert fixed.sides[0].owed.data.any(1).sum() > 1
        assert torch.equal(state["owed"], fixed.sides[0].owed.data[ids])


@pytest.mark.parametrize("num_samples", [None, M])
def test_a_forgotten_sample_leaves_nothing(num_samples: int | None) -> None:
    loss_fn, gone = EMC2Loss(num_samples, 0.2, num_chains=2, carry="defer"), torch.arange(0, M, 2)
    for z1, z2, index in batches(8, own_chains=False, seed=0):
        loss_fn(z1, z2, index)
    loss_fn.forget(gone)
    slots = loss_fn.sides[0].slots.find(gone) if num_samples else torch.tensor(loss_fn.sides[0].slots._free)
    assert len(slots) > 3
    assert not torch.isin(loss_fn.chains.ids.data, gone).any()
    assert (loss_fn.chains.ids.data[slots] == -1).all()
    assert (loss_fn.sides[0].embeddings.data[slots] == 0).all()
    assert (loss_fn.sides[0].owed.data[slots] == 0).all()


def test_chains_are_emptied_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_emc2.memory.chains._CHUNK", 3)
    loss_fn = EMC2Loss(M, carry="drop")
    loss_fn.chains.write(torch.arange(M), torch.arange(M)[:, None] // 2, torch.zeros(M, 1))
    loss_fn.forget(torch.tensor([5, 9, 9]))
    want = [-1 if i in (5, 9) or i // 2 in (5, 9) else i // 2 for i in range(M)]
    assert loss_fn.chains.ids.data[:, 0].tolist() == want
    assert loss_fn.chains.similarities.data[:, 0].tolist() == [-math.inf if at < 0 else 0.0 for at in want]


class _Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation has newly made."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("kernel", ["metropolis", "isir"])
@pytest.mark.parametrize("carry", POLICIES)
def test_a_step_makes_nothing_of_the_size_of_the_table(carry: Carry, kernel: str) -> None:
    rows, largest = torch.randn(10**6, D), []
    for size in (1000, 10**6):
        loss_fn = EMC2Loss(size, carry=carry, kernel=kernel)
        for z1, z2, index in batches(3, own_chains=False, seed=0):  # the first makes the cache
            with _Largest() as mode:
                loss_fn(z1.requires_grad_(), z2.requires_grad_(), index, encode=rows.__getitem__).backward()
        largest.append(mode.largest)
    assert largest[0] == largest[1] < 1000


def test_saving_copies_nothing_and_loading_fills_the_table() -> None:
    first, second = EMC2Loss(M), EMC2Loss(M)
    for loss_fn in (first, second):
        loss_fn(*torch.randn(2, B, D), torch.arange(B))
    state = first.get_extra_state()
    before = [second.chains.ids.data, second.sides[0].embeddings.data]
    tables = [first.chains.ids, first.sides[0].embeddings]
    saved = [*state["chains"].values(), state["embeddings"]]
    assert all(a is table.data for a, table in zip(saved, tables, strict=True))
    second.set_extra_state(state)
    after = [second.chains.ids.data, second.sides[0].embeddings.data]
    assert all(a is b for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(after, saved, rtol=0, atol=0)


def test_a_state_of_another_kind_of_ids_changes_nothing() -> None:
    fixed, keyed = EMC2Loss(M), EMC2Loss(None)
    for loss_fn in (fixed, keyed):
        loss_fn(*torch.randn(2, B, D), torch.arange(B))
    for loss_fn, other in ((fixed, keyed), (keyed, fixed)):
        before = copy.deepcopy(loss_fn.state_dict())
        with pytest.raises(ValueError, match="the state was saved with num_samples"):
            loss_fn.load_state_dict(other.state_dict())
        torch.testing.assert_close(loss_fn.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("carry", "size"), [("encode", 4), ("cache", 4), ("encode_if_used", 8), ("drop", 8)])
def test_a_chain_costs_four_bytes_and_four_where_its_score_is_read(carry: Carry, size: int) -> None:
    state = EMC2Loss(1000, num_chains=3, carry=carry).chains.state()
    assert sum(table.nbytes for table in state.values()) == size * 3 * 1000


def contrast(z1: Tensor, z2: Tensor) -> Contrast:
    (only,) = gather_batch(functools.partial(validate_inputs, z1, z2, None), z1.device)
    return only


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws by tensors; those of compiled loops are tested in kernels/test_numba.py."""
    monkeypatch.setattr("torch_emc2.losses.draws.compiled_kernels", lambda device: None)


@pytest.mark.usefixtures("without_numba")
def test_noise_is_exponential_and_finite() -> None:
    noise = BatchDraws(contrast(*torch.randn(2, 500, D)), seed=7, call=0).of(slice(0, 1000)).exponential(500)
    assert noise.isfinite().all()
    assert noise.min() >= 0
    assert noise.mean().item() == pytest.approx(1, abs=4 / noise.numel() ** 0.5)
    assert (noise > 2).float().mean().item() == pytest.approx(math.exp(-2), abs=4 * (0.135 / noise.numel()) ** 0.5)


@pytest.mark.usefixtures("without_numba")
def test_every_seed_call_time_and_view_has_noise_of_its_own() -> None:
    pairs = contrast(*torch.randn(2, 150, D))  # more samples than share a block
    each = [BatchDraws(pairs, seed, call).of(slice(0, 300)) for seed in (0, 1) for call in (0, 1)]
    draws = torch.cat([draws.exponential(50).view(2, -1) for draws in each for _ in range(2)])
    blocks = torch.cat([draws[:, : 64 * 50 // 3], draws[:, -(64 * 50 // 3) :]])  # of the first and of the last block
    correlation = torch.corrcoef(blocks) - torch.eye(len(blocks))
    assert correlation.abs().max() < 5 / blocks.shape[1] ** 0.5


@pytest.mark.usefixtures("without_numba")
def test_parts_draw_what_the_whole_draws() -> None:
    draws = BatchDraws(contrast(*torch.randn(2, 150, D)), seed=3, call=1)
    whole = draws.of(slice(0, 300)).exponential(4)
    for start, stop in ((0, 128), (100, 200), (149, 151), (170, 300)):
        assert torch.equal(draws.of(slice(start, stop)).exponential(4), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cold_near_duplicates_stay_finite_and_chains_move(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    centre = torch.randn(4, 16)
    loss_fn = EMC2Loss(64, temperature=0.01, carry="encode", num_chains=2)
    table = (centre[torch.arange(64) % 4] + 1e-3 * torch.randn(64, 16)).to(dtype).requires_grad_()
    moved = 0
    for _ in range(60):
        index = torch.randperm(64)[:16]
        before = loss_fn.chains.ids.data.clone()
        loss = loss_fn(table[index], table[index] + 1e-3, index, encode=table.__getitem__)
        loss.backward()
        assert loss.isfinite()
        assert table.grad is not None
        assert table.grad.isfinite().all()
        moved += int((loss_fn.chains.ids.data != before).sum())
    visits = 60 * 16 * 2
    assert moved > 0.5 * visits  # among 14 near-duplicates in the batch, most visits end elsewhere


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "gibbs"}, "kernel must be one of metropolis, isir, or a Kernel; got 'gibbs'"),
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"carry": "keep"}, "carry must be one of encode, encode_if_used, cache, defer, drop; got 'keep'"),
        ({"temperature": 0.0}, r"temperature must be a positive number \(at least 1e-30\), got 0.0"),
        ({"temperature": 9e-31}, r"temperature must be a positive number \(at least 1e-30\), got 9e-31"),
        ({"temperature": 10**400}, r"temperature must be a positive number \(at least 1e-30\), got 1000"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMC2Loss(**({"num_samples": 10} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("carry", ["encode", "encode_if_used"])
def test_encode_is_asked_for_and_checked(carry: str) -> None:
    loss_fn = EMC2Loss(M, kernel=Metropolis(0.0), carry=carry)  # type: ignore[arg-type]
    z = torch.randn(2, B, D)
    index = torch.arange(B)
    with pytest.raises(ValueError, match="needs encode"):
        loss_fn(*z, index)
    for _ in range(5):
        loss_fn(*z, index, encode=lambda ids: torch.randn(len(ids), D))
    before = loss_fn.chains.ids.data.clone()
    for wrong, message in (
        (lambda ids: torch.randn(len(ids), D + 1), rf"encode must return \(\d, {D}\)"),
        (lambda ids: torch.randn(2 * len(ids), D), rf"encode must return \(\d, {D}\)"),
        (lambda ids: torch.full((len(ids), D), torch.nan), r"encode\(\d+\) is not finite"),
        (lambda ids: torch.zeros(len(ids), D), r"encode\(\d+\) has length 0 and so no direction"),
    ):
        with pytest.raises(ValueError, match=message):  # noqa: PT012
            for _ in range(10):  # "if used": until one is
                loss_fn(*z, index, encode=wrong)
        if carry == "encode":
            assert torch.equal(loss_fn.chains.ids.data, before)
