"""The compiled moves against the same moves by tensors, with the same draws; and what they draw."""

import logging
import math
from types import ModuleType

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.test_every_kernel import visits
from torch_emc2.kernels import EMPTY, Isir, Kernel, Metropolis, Visit
from torch_emc2.kernels import counted as counted_module
from torch_emc2.kernels.counted import CountedDraws, compiled_kernels
from torch_emc2.ranks import Ranks

CPU = torch.device("cpu")


def test_the_compiled_moves_are_under_test() -> None:
    assert compiled_kernels("cpu") is not None, "numba is part of the dev extra: without it they are not tested"


def test_compiling_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    def moved(x: float) -> float:
        return x + 1

    def of_another(x: float) -> float:
        return x + 1

    kernels = compiled_kernels("cpu")
    assert kernels is not None
    moved.__module__ = kernels.__name__
    counted_module._tell_once.cache_clear()
    caplog.set_level(logging.INFO, "torch_emc2")
    assert numba.njit(of_another)(1.0) == 2
    assert caplog.messages == []
    own = numba.njit(moved)
    assert (own(1.0), own(1)) == (2, 2)  # compiled for either
    assert [message.split(":")[0] for message in caplog.messages] == ["Compiling the chains' moves for this processor"]


def counted(rows: int, seed: int, dtype: torch.dtype, *, first: int = 0, ranks: Ranks | None = None) -> CountedDraws:
    kernels = compiled_kernels("cpu")
    assert kernels is not None
    return CountedDraws(kernels, seed, first, rows, ranks or Ranks((rows,), 0, CPU), dtype)


class ByTensors:
    """The same draws, of which kernels do not know that they are counted."""

    def __init__(self, draws: CountedDraws) -> None:
        self.exponential = draws.exponential


def check(kernel: Kernel, visit: Visit, seed: int) -> None:
    rows, dtype = len(visit.logits), visit.logits.dtype
    compiled = kernel.move(visit, counted(rows, seed, dtype))
    move = kernel.move(visit, ByTensors(counted(rows, seed, dtype)))
    assert torch.equal(compiled.state, move.state)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for name in ("weights", "carried_weights", "acceptance"):
        torch.testing.assert_close(getattr(compiled, name), getattr(move, name), **close)


@pytest.mark.parametrize("kernel", [Metropolis(), Metropolis(0.0), Metropolis(0.9), Isir()])
@settings(max_examples=60, deadline=None)
@given(visit=visits(), seed=st.integers(0, 2**63))
def test_compiled_moves_are_those_by_tensors(kernel: Kernel, visit: Visit, seed: int) -> None:
    check(kernel, visit, seed)


def batch(rows: int, n: int, chains: int, dtype: torch.dtype, *, column_first: bool) -> Visit:
    """A visit as a batch makes it: a row has two that are none, one is in both sets, some chains are empty."""
    generator = torch.Generator().manual_seed(rows * n + chains)
    of_samples = 2 * (n - 1)
    scores = torch.randn(of_samples + 1, rows, dtype=torch.float64, generator=generator) * 3
    sets = torch.randperm(of_samples, generator=generator).view(2, n - 1)
    sets = torch.cat([sets, torch.full((2, 1), of_samples)], 1)[:, torch.randperm(n, generator=generator)]
    own = (sets[0] < of_samples).nonzero()[:, 0][torch.randint(n - 1, (rows,), generator=generator)]
    scores[sets[:, own], torch.arange(rows)] = -torch.inf
    carried_ids = torch.randint(EMPTY, 4 * n, (rows, chains), generator=generator)
    carried = torch.randn(rows, chains, dtype=torch.float64, generator=generator) * 3
    carried[carried_ids == EMPTY] = -torch.inf
    scores = scores.to(dtype).T
    return Visit(
        scores if column_first else scores.contiguous(),
        sets,
        carried.to(dtype),
        torch.randint(2, (rows, chains), generator=generator),
        carried_ids,
        torch.randperm(of_samples + 1, generator=generator),
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kernel", [Metropolis(), Isir()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "n", "chains"), [(2, 2, 1), (64, 31, 1), (65, 33, 4), (300, 257, 3)])
def test_whole_batches(
    rows: int, n: int, chains: int, dtype: torch.dtype, kernel: Kernel, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for column_first in (False, True):
        check(kernel, batch(rows, n, chains, dtype, column_first=column_first), seed=n)


def draws_of(whole: int, seed: int, ranks: Ranks, first: int, rows: int, shape: tuple[int, ...]) -> Tensor:
    return counted(rows, seed, torch.float64, first=first, ranks=ranks).exponential(*shape)


def test_parts_and_ranks_draw_what_the_whole_draws() -> None:
    whole = counted(14, 5, torch.float64).exponential(3, 2).view(2, 7, 3, 2)  # two views of seven samples
    alone = Ranks((7,), 0, CPU)
    assert torch.equal(draws_of(7, 5, alone, 4, 6, (3, 2)), whole.flatten(0, 1)[4:10])
    second = draws_of(7, 5, Ranks((3, 4), 1, CPU), 0, 8, (3, 2))
    assert torch.equal(second.view(2, 4, 3, 2), whole[:, 3:])


def test_draws_are_exponential_finite_and_independent() -> None:
    of_rows = [counted(40, seed, torch.float64) for seed in (0, 1, 2**63)]
    noise = torch.stack([draws.exponential(5000) for draws in of_rows for _ in range(2)])  # twice: other numbers
    assert noise.isfinite().all()
    assert noise.min() >= 0
    count = noise.numel()
    assert noise.mean().item() == pytest.approx(1, abs=4 / count**0.5)
    for far in (0.1, 1.0, 5.0, 9.0):
        share = math.exp(-far)
        assert (noise > far).double().mean().item() == pytest.approx(share, abs=4 * (share / count) ** 0.5)
    rows = noise.flatten(0, 1)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows), dtype=torch.float64)
    assert correlation.abs().max() < 5.5 / 5000**0.5
    neighbours = torch.corrcoef(torch.stack([rows[:, 1:].flatten(), rows[:, :-1].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 4 / rows.numel() ** 0.5
    uniform = (-noise.flatten()).exp()
    counts = torch.histc(uniform, 200, 0, 1)
    chi2 = float(((counts - count / 200) ** 2 / (count / 200)).sum())
    assert chi2 < 267  # the 0.999 quantile for 199 degrees of freedom


def shuffled(kernels: ModuleType, device: torch.device, key: int, size: int, num_hard: int, views: int) -> list[Tensor]:
    """Sets, places and 50 coins."""
    sizes = (views, size + num_hard), (size + num_hard,), (50,)
    drawn = [torch.full(each, -7, dtype=torch.int64, device=device) for each in sizes]
    kernels.shuffle(key, size, *drawn)
    return [each.cpu() for each in drawn]


def check_shuffles(kernels: ModuleType, device: torch.device, times: int) -> None:
    """Three samples of some views and a hard negative: every order, view and coin comes as often as another."""
    for views in (1, 2, 3):
        places, of_samples, coins = torch.zeros(4, 4), torch.zeros(3, views), torch.zeros(1, views)
        for number in range(times):
            sets, place, thrown = shuffled(kernels, device, number * 0x9E3779B97F4A7C15 % 2**64, 3, 1, views)
            sample = torch.where(sets < 3 * views, sets % 3, 3)
            assert (sample == sample[0]).all()
            assert torch.equal(sample[0][place], torch.arange(4))
            assert sorted(sets[:, sample[0] < 3].flatten().tolist()) == list(range(3 * views))
            assert (sets[:, place[3]] == 3 * views).all()
            places[torch.arange(4), place] += 1
            of_samples[torch.arange(3), sets[0, place[:3]] // 3] += 1
            coins += torch.bincount(thrown, minlength=views)
        for counts, options, count in ((places, 4, times), (of_samples, views, times), (coins, views, 50 * times)):
            share = 1 / options
            assert counts.shape[1] == options
            assert (counts / count - share).abs().max() < 5 * (share * (1 - share) / count) ** 0.5 + 1e-6
    sets, place, _ = shuffled(kernels, device, 7, 300, 0, 2)  # of more than a block
    assert sorted(sets.flatten().tolist()) == list(range(600))
    assert torch.equal(sets[0][place] % 300, torch.arange(300))


def test_orders_views_and_coins_are_fair() -> None:
    kernels = compiled_kernels("cpu")
    assert kernels is not None
    check_shuffles(kernels, CPU, times=6000)


def test_compiles_where_no_folder_may_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    caching = pytest.importorskip("numba.core.caching")
    compiled = compiled_kernels("cpu")
    assert compiled is not None
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])  # numba's way to look for a place
    again = compiled._compiled()(compiled._holds.py_func)
    assert again(torch.arange(3).numpy(), 2)
    assert not again(torch.arange(3).numpy(), 3)


@pytest.mark.parametrize("fails_at", [0, 100])
def test_what_a_thread_raises_is_raised(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_kernels("cpu")
    assert compiled is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def fail(begin: int, end: int) -> None:
        if begin <= fails_at < end:
            raise MemoryError("no room for a walk")

    with pytest.raises(MemoryError, match="no room for a walk"):
        compiled._in_threads(fail, (), 150, 1 << 30)
