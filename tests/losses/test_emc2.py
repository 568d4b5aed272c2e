"""EMC² against a slow version with a dictionary of chains and one step after the other."""

import copy
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_emc2 import EMC2Loss
from torch_emc2.batch import gather_batch
from torch_emc2.geometry import Contrast
from torch_emc2.kernels import Draws as KernelDraws
from torch_emc2.kernels import Isir, Metropolis, Move, Visit
from torch_emc2.losses.draws import BatchDraws
from torch_emc2.losses.emc2 import Carry
from torch_emc2.seeds import mix_seed
from torch_emc2.validation import validate_inputs

M, B, D = 24, 5, 6
POLICIES = ("encode", "encode_if_used", "cache", "drop")


class Draws:
    """What chance decides in a call of the loss under test, as it decides it."""

    def __init__(self, seed: int, call: int, size: int, num_chains: int) -> None:
        self.words, self.size, self.num_chains = (seed, call), size, num_chains
        generator = self._generator(-1)
        samples = torch.randperm(size, generator=generator).tolist()
        views = torch.randint(2, (size,), generator=generator).tolist()
        first = [i + size * view for i, view in zip(samples, views, strict=True)]
        self.sets = first, [(j + size) % (2 * size) for j in first]  # of columns: a view of each sample, and the others
        self.coins = torch.randint(2, (size, 3, num_chains), generator=self._generator(-2)).tolist()

    def _generator(self, place: int) -> torch.Generator:
        return torch.Generator().manual_seed(mix_seed(*self.words, place))

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1), (2, size, *shape)."""
        return torch.empty(2, self.size, *shape, dtype=torch.float64).uniform_(generator=self._generator(0))


class SlowEMC2:
    """One chain after the other and one step after the other, in Python numbers."""

    def __init__(self, temperature: float, burn_in: float, num_chains: int, carry: str, seed: int) -> None:
        self.temperature, self.burn_in, self.num_chains = temperature, burn_in, num_chains
        self.carry, self.seed = carry, seed
        self.chains: dict[tuple[int, int], tuple[int, float]] = {}  # the carried negative and its similarity
        self.cached: dict[int, Tensor] = {}
        self.calls = 0

    def forget(self, ids: Tensor) -> None:
        gone = ids.tolist()
        self.chains = {key: at for key, at in self.chains.items() if key[0] not in gone and at[0] not in gone}
        self.cached = {i: z for i, z in self.cached.items() if i not in gone}

    def __call__(self, z1: Tensor, z2: Tensor, index: Tensor, table: Tensor) -> Tensor:
        size = len(z1)
        columns = [F.normalize(z, dim=0) for z in (*z1, *z2)]
        ids = [*index.tolist(), *index.tolist()] if index.ndim == 1 else index.T.flatten().tolist()
        draws, total, estimates = Draws(self.seed, self.calls, size, self.num_chains), torch.zeros(()), []
        noise = -torch.log(1 - draws.uniform(2, self.num_chains, size))
        after, accepted = dict(self.chains), []
        for view, sample, chain in itertools.product(range(2), range(size), range(self.num_chains)):
            row = columns[view * size + sample]
            logit = [float(row.detach() @ column.detach()) / self.temperature for column in columns]
            positive, key = (1 - view) * size + sample, (ids[view * size + sample], chain)
            negatives = [j for j in range(2 * size) if j % size != sample]
            log_mass = torch.tensor([logit[j] for j in negatives]).logsumexp(0) - math.log(len(negatives))
            estimates.append(float(log_mass) - logit[positive])
            total = total - row @ columns[positive] / self.num_chains

            carried, similarity = self.chains.get(key, (None, -math.inf))
            entry = similarity / self.temperature
            embedding = None
            if carried is not None and self.carry.startswith("encode"):
                embedding = F.normalize(table[carried], dim=0)
            elif carried is not None and self.carry == "cache":
                embedding = self.cached[carried]
            fresh = None if embedding is None else float(row.detach() @ embedding.detach()) / self.temperature
            if self.carry in ("encode", "cache") and fresh is not None:
                entry = fresh
            for number, columns_of_set in enumerate(draws.sets):
                state, score = None, entry  # None: at the carried negative
                steps = [(k, j) for k, j in enumerate(columns_of_set) if j % size != sample]
                burnt = int(self.burn_in * len(steps))
                for step, (k, j) in enumerate(steps):
                    accepted.append(logit[j] + float(noise[view, sample, number, chain, k]) > score)
                    if accepted[-1]:
                        state, score = j, logit[j]
                    if step >= burnt:
                        met = embedding if state is None else columns[state]
                        if met is not None:
                            total = total + (row @ met) / (2 * self.num_chains * (len(steps) - burnt))
                if state is None and self.carry == "encode_if_used" and fresh is not None:
                    score = fresh
                kept_view = draws.coins[sample][2][chain] if index.ndim == 1 else view
                if (view, number) == (kept_view, draws.coins[sample][view][chain]):
                    end = carried if state is None else ids[state]
                    assert end is not None
                    after[key] = (end, score * self.temperature)
        self.chains, self.calls, self.acceptance = after, self.calls + 1, sum(accepted) / len(accepted)
        for j in range(size if index.ndim == 1 else 2 * size):
            self.cached[ids[j]] = columns[j].detach()
        value = sum(estimates) / len(estimates)
        surrogate = total / (2 * size * self.temperature)
        return value + surrogate - surrogate.detach()


def batches(count: int, own_chains: bool, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        index = torch.randperm(M, generator=generator)[:B]
        z1, z2 = torch.randn(2, B, D, dtype=torch.float64, generator=generator).unbind()
        out.append((z1, z2, torch.stack([2 * index, 2 * index + 1], 1) if own_chains else index))
    return out


@pytest.mark.parametrize("own_chains", [False, True])
@pytest.mark.parametrize("num_chains", [1, 3])
@pytest.mark.parametrize("carry", POLICIES)
@pytest.mark.parametrize("burn_in", [0.0, 0.5, 0.9])
def test_equals_the_slow_version(carry: str, num_chains: int, own_chains: bool, burn_in: float) -> None:
    table = torch.randn(2 * M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast = EMC2Loss(2 * M, 0.2, kernel=Metropolis(burn_in), num_chains=num_chains, carry=carry, seed=5)
    slow = SlowEMC2(0.2, burn_in, num_chains, carry, seed=5)
    carried = 0.0
    for step, (z1, z2, index) in enumerate(batches(12, own_chains, seed=2)):
        for loss_fn in (fast, slow):
            loss_fn.temperature = 0.2 if step < 6 else 0.4
        if step == 8:
            for loss_fn in (fast, slow):
                loss_fn.forget(torch.arange(0, 2 * M, 3))
        gradients, values = [], []
        for loss_fn in (fast, slow):
            inputs = [tensor.clone().requires_grad_() for tensor in (z1, z2, table)]
            a, b, rows = inputs
            extra = {"encode": rows.__getitem__} if loss_fn is fast and carry.startswith("encode") else {}
            loss = fast(a, b, index, **extra) if loss_fn is fast else slow(a, b, index, rows)
            loss.backward()
            values.append(loss.detach())
            gradients.append([torch.zeros_like(t) if t.grad is None else t.grad for t in inputs])
        carried += float(fast.last["carried_share"])
        assert float(fast.last["acceptance"]) == pytest.approx(slow.acceptance)
        torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)
    if burn_in == 0:
        assert carried > 0, "the carried negatives were never weighed: this test shows nothing of them"
    ids = fast.chains.ids.data
    assert {(i, c): int(ids[i, c]) for i, c in slow.chains} == {key: end for key, (end, _) in slow.chains.items()}
    assert int((ids >= 0).sum()) == len(slow.chains)
    assert (fast.chains.similarities is None) == (carry in ("encode", "cache"))
    if fast.chains.similarities is not None:
        for (i, c), (_, similarity) in slow.chains.items():
            assert float(fast.chains.similarities.data[i, c]) == pytest.approx(similarity, rel=1e-6)


@pytest.mark.parametrize("own_chains", [False, True])
def test_encode_if_used_is_asked_for_what_is_used_alone(own_chains: bool) -> None:
    """Used are those that the slow version's gradient reaches."""
    table = torch.randn(2 * M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    fast = EMC2Loss(2 * M, 0.2, kernel=Metropolis(0.3), num_chains=2, carry="encode_if_used", seed=5)
    slow = SlowEMC2(0.2, 0.3, 2, "encode_if_used", seed=5)
    all_carried, all_asked = 0, 0
    for z1, z2, index in batches(12, own_chains, seed=2):
        asked: list[int] = []
        carried = fast.chains.ids.data[index.flatten()]

        def encode(ids: Tensor, asked: list[int] = asked) -> Tensor:
            asked += ids.tolist()
            return table[ids]

        fast(z1, z2, index, encode=encode)
        (gradient,) = torch.autograd.grad(slow(z1.requires_grad_(), z2, index, table), table, materialize_grads=True)
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

    def spy(self: Metropolis | Isir, visit: Visit, draws: KernelDraws) -> Move:
        moved = move(self, visit, draws)  # type: ignore[arg-type]
        shares.append((visit.log_scores == -torch.inf, moved.weights, moved.carried_weights))
        return moved

    monkeypatch.setattr(type(loss_fn.kernel), "move", spy)
    for z1, z2, index in batches(10, own_chains, seed=0):
        loss_fn(z1, z2, index, encode=lambda ids: torch.randn(len(ids), D, dtype=torch.float64))
    assert len(shares) == 10
    for own, in_sets, at_carried in shares:
        total = in_sets.sum((1, 2)) + at_carried.sum(1) / 2
        torch.testing.assert_close(total, torch.ones(2 * B, dtype=torch.float64))
        assert own.sum() == 2 * B * 2
        assert (in_sets[own] == 0).all()


class SlowISIR:
    """One chain after the other, in Python numbers."""

    def __init__(self, temperature: float, num_chains: int, carry: str, seed: int) -> None:
        self.temperature, self.num_chains, self.carry, self.seed = temperature, num_chains, carry, seed
        self.chains: dict[tuple[int, int], tuple[int, float]] = {}  # the carried negative and its similarity
        self.calls = 0

    def __call__(self, z1: Tensor, z2: Tensor, index: Tensor, table: Tensor) -> Tensor:
        size, total = len(z1), torch.zeros((), dtype=torch.float64)
        ids = [*index.tolist(), *index.tolist()] if index.ndim == 1 else index.T.flatten().tolist()
        columns = [F.normalize(z, dim=0) for z in (*z1, *z2)]
        draws = Draws(self.seed, self.calls, size, self.num_chains)
        uniform = draws.uniform(2, self.num_chains)
        parts = uniform[:, :, 1].argsort(-1)  # which part of (0, 1] each chain draws from
        places = (parts + 1 - uniform[:, :, 0]) / self.num_chains
        after, stay = dict(self.chains), 0.0
        for view, sample, chain in itertools.product(range(2), range(size), range(self.num_chains)):
            row, key = columns[view * size + sample], (ids[view * size + sample], chain)
            total = total - row @ columns[(1 - view) * size + sample] / self.num_chains
            carried, stored = self.chains.get(key, (None, -math.inf))
            embedding = None
            if carried is not None and self.carry != "drop":
                embedding = F.normalize(table[carried], dim=0)
            fresh = stored if embedding is None else float(row.detach() @ embedding.detach())
            holding = [number for number in range(2) if carried in [ids[j] for j in draws.sets[number]]]
            used = holding or [0, 1]  # a set with another view of what is carried than the one with itself is not
            number = draws.coins[sample][view][chain] if len(used) == 2 else used[0]
            for candidates in (draws.sets[each] for each in used):
                negatives = [j for j in candidates if j % size != sample]
                similarities = [float(row.detach() @ columns[j].detach()) for j in negatives]
                outside = carried is not None and not holding
                entry = fresh if self.carry == "encode" else stored
                logits = torch.tensor([entry if outside else -math.inf, *similarities], dtype=torch.float64)
                weights = (logits / self.temperature).softmax(0)
                stay += float(weights[0]) / (2 * size * self.num_chains * len(used))
                for met, weight in zip([embedding, *(columns[j] for j in negatives)], weights.tolist(), strict=True):
                    if met is not None:
                        total = total + weight * (row @ met) / (self.num_chains * len(used))
                kept_view = draws.coins[sample][2][chain] if index.ndim == 1 else view
                if view == kept_view and candidates is draws.sets[number]:
                    # The draw's place on the line: the carried state first, then the set's columns in their order.
                    reach = (weights.cumsum(0) >= float(places[view, sample, chain])).tolist()
                    choice = reach.index(True) if True in reach else len(negatives)
                    if choice:
                        after[key] = (ids[negatives[choice - 1]], similarities[choice - 1])
                    else:
                        after[key] = (carried, fresh)
        self.chains, self.calls, self.acceptance = after, self.calls + 1, 1 - stay
        return total / (2 * size * self.temperature)


@pytest.mark.parametrize("own_chains", [False, True])
@pytest.mark.parametrize("carry", ["encode", "encode_if_used", "drop"])
@pytest.mark.parametrize("num_chains", [1, 2])
def test_isir_equals_the_slow_version(num_chains: int, carry: Carry, own_chains: bool) -> None:
    table = torch.randn(2 * M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast = EMC2Loss(2 * M, 0.3, num_chains=num_chains, carry=carry, kernel="isir", seed=5)
    slow = SlowISIR(0.3, num_chains, carry, seed=5)
    for step, (z1, z2, index) in enumerate(batches(15, own_chains, seed=2)):
        fast.temperature = slow.temperature = 0.3 if step < 7 else 0.6
        gradients = []
        for loss_fn in (fast, slow):
            a, b, rows = (tensor.clone().requires_grad_() for tensor in (z1, z2, table))
            loss = fast(a, b, index, encode=rows.__getitem__) if loss_fn is fast else slow(a, b, index, rows)
            gradients.append(torch.autograd.grad(loss, (a, b, rows), materialize_grads=True))
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
        assert float(fast.last["acceptance"]) == pytest.approx(slow.acceptance, rel=1e-6)
        assert float(fast.last["carried_share"]) == pytest.approx(1 - slow.acceptance, rel=1e-6, abs=1e-12)
        for (i, c), (end, similarity) in slow.chains.items():
            assert int(fast.chains.ids.data[i, c]) == end
            if fast.chains.similarities is not None:
                assert float(fast.chains.similarities.data[i, c]) == pytest.approx(similarity, rel=1e-6)


def test_a_stale_score_does_not_hold_its_chain() -> None:
    loss_fn = EMC2Loss(M, 0.1, kernel=Metropolis(0.0), carry="encode_if_used")
    index, rows = torch.arange(B), torch.randn(M, D)
    loss_fn.chains.write(index, torch.full((B, 1), M - 1), torch.full((B, 1), 1e6))  # which nothing can reach
    z = torch.randn(2, B, D)
    loss_fn(*z, index, encode=rows.__getitem__)
    kept = torch.tensor(Draws(seed=0, call=0, size=B, num_chains=1).coins)[:, 2, 0]
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
    if carry == "cache":
        assert torch.equal(state["embeddings"], fixed.sides[0].embeddings.data[ids])


@pytest.mark.parametrize("num_samples", [None, M])
def test_a_forgotten_sample_leaves_nothing(num_samples: int | None) -> None:
    loss_fn, gone = EMC2Loss(num_samples, 0.2, num_chains=2), torch.arange(0, M, 2)
    for z1, z2, index in batches(8, own_chains=False, seed=0):
        loss_fn(z1, z2, index)
    loss_fn.forget(gone)
    slots = loss_fn.sides[0].slots.find(gone) if num_samples else torch.tensor(loss_fn.sides[0].slots._free)
    assert len(slots) > 3
    assert not torch.isin(loss_fn.chains.ids.data, gone).any()
    assert (loss_fn.chains.ids.data[slots] == -1).all()
    assert (loss_fn.sides[0].embeddings.data[slots] == 0).all()


def test_chains_are_emptied_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_emc2.chains._CHUNK", 3)
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


def test_noise_is_exponential_and_finite() -> None:
    noise = BatchDraws(contrast(*torch.randn(2, 500, D)), seed=7, call=0).exponential(500)
    assert noise.isfinite().all()
    assert noise.min() >= 0
    assert noise.mean().item() == pytest.approx(1, abs=4 / noise.numel() ** 0.5)
    assert (noise > 2).float().mean().item() == pytest.approx(math.exp(-2), abs=4 * (0.135 / noise.numel()) ** 0.5)


def test_every_seed_call_time_and_view_has_noise_of_its_own() -> None:
    pairs = contrast(*torch.randn(2, 300, D))  # more samples than share a block
    each = [BatchDraws(pairs, seed, call) for seed in (0, 1) for call in (0, 1)]
    draws = torch.cat([draws.exponential(50).view(2, -1) for draws in each for _ in range(2)])
    blocks = torch.cat([draws[:, : 256 * 50 // 6], draws[:, -(256 * 50 // 6) :]])  # of the first and of the last block
    correlation = torch.corrcoef(blocks) - torch.eye(len(blocks))
    assert correlation.abs().max() < 5 / blocks.shape[1] ** 0.5


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
        ({"carry": "keep"}, "carry must be one of encode, encode_if_used, cache, drop; got 'keep'"),
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
