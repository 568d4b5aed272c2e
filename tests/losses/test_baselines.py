"""InfoNCE, DCL, SogCLR and Negative Cache: formulas, memory, and settings; step by step they are in test_one_tower."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side import check_memory
from slow import Batch, NegativeCache, SogCLR
from torch import Tensor

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss
from torch_emc2.losses import ContrastiveLoss

M, B, D = 20, 5, 6


def views(seed: int, size: int = B, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, size, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return z[0].requires_grad_(), z[1].requires_grad_()


def rows_of(z1: Tensor, z2: Tensor, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Every row's logit of its positive and of its negatives, in order."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    size = len(z1)
    out = []
    for row in range(2 * size):
        negatives = [j for j in range(2 * size) if j % size != row % size]
        out.append((z[row] @ z[(row + size) % (2 * size)] / temperature, z[negatives] @ z[row] / temperature))
    return out


def check(loss: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(loss, inputs)
    want = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 9), temperature=st.sampled_from([0.02, 0.07, 0.5, 2.0]))
def test_infonce_is_the_cross_entropy_of_torch(seed: int, size: int, temperature: float) -> None:
    z1, z2 = views(seed, size)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * size, dtype=torch.bool), -torch.inf)
    expected = F.cross_entropy(logits, torch.arange(2 * size).roll(size))
    check(InfoNCELoss(temperature)(z1, z2), expected, (z1, z2))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 9), temperature=st.sampled_from([0.02, 0.07, 0.5, 2.0]))
def test_dcl_is_its_formula(seed: int, size: int, temperature: float) -> None:
    z1, z2 = views(seed, size)
    terms = [negatives.logsumexp(0) - positive for positive, negatives in rows_of(z1, z2, temperature)]
    check(DCLLoss(temperature)(z1, z2), torch.stack(terms).mean(), (z1, z2))


@pytest.mark.parametrize("gamma", [0.1, 0.9])
@pytest.mark.parametrize("own_ids", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
def test_sogclr_goes_on_from_what_is_saved_and_forgotten(gamma: float, own_ids: bool, keyed: bool) -> None:
    loss_fn, slow = SogCLRLoss(None if keyed else 2 * M, 0.3, gamma), SogCLR(gamma)
    key_of = torch.arange(2 * M) * (0x9E3779B97F4A7C15 - 2**64 if keyed else 1)  # wraps
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        if step == 5:
            gone = range(0, 2 * M, 3)
            loss_fn.forget(key_of[gone])
            slow.forget([*gone])
        z1, z2 = views(step)
        index = torch.randperm(M, generator=generator)[:B]
        ids = torch.stack([2 * index + 1, 2 * index], 1) if own_ids else index
        expected = slow(Batch(z1, z2, ids), torch.tensor(1 / 0.3, dtype=torch.float64))
        check(loss_fn(z1, z2, key_of[ids]), expected, (z1, z2), tolerance=1e-6)  # the averages are kept in float32
        loaded = SogCLRLoss(loss_fn.num_samples, 0.3, gamma)
        loaded.load_state_dict(loss_fn.state_dict())
        loss_fn = loaded


def test_sogclr_with_gamma_one_is_dcl() -> None:
    z1, z2 = views(0)
    sogclr, dcl = SogCLRLoss(M, 0.1, gamma=1.0)(z1, z2, torch.arange(B)), DCLLoss(0.1)(z1, z2)
    got, want = torch.autograd.grad(sogclr, (z1, z2)), torch.autograd.grad(dcl, (z1, z2))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("own_ids", [0, 2, 3])  # a sample, of its views
@pytest.mark.parametrize("with_encode", [False, True])
def test_negative_cache_goes_on_from_what_is_forgotten(own_ids: int, with_encode: bool) -> None:
    entries, settings = (own_ids or 1) * M, {"refresh_fraction": 0.15, "views_per_sample": own_ids or 2, "seed": 3}
    loss_fn = NegativeCacheLoss(entries, D, 0.3, **settings)  # type: ignore[arg-type]
    slow = NegativeCache(**settings, num_samples=(entries, entries))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(entries, D, dtype=torch.float64, generator=generator).requires_grad_()
    for step in range(8):
        if step == 5:
            gone = range(0, entries, 3)
            loss_fn.forget(torch.tensor(gone))
            slow.forget([*gone])
        z1, z2 = views(step)
        index = torch.randperm(M, generator=generator)[:B]
        ids = torch.stack([own_ids * index, own_ids * index + own_ids - 1], 1) if own_ids else index
        loss = loss_fn(z1, z2, ids, encode=table.__getitem__ if with_encode else None)
        beta = torch.tensor(1 / 0.3, dtype=torch.float64)
        expected = slow(Batch(z1, z2, ids), beta, (table, table) if with_encode else None)
        check(loss, expected, (z1, z2, table) if with_encode else (z1, z2), tolerance=1e-6)
        check_memory(loss_fn, slow)
        assert float(loss_fn.last["cached_share"]) == pytest.approx(len(slow.cached) / entries)


@pytest.mark.parametrize("failing", ["refresh", "draw"])
def test_negative_cache_is_unchanged_by_an_encode_that_fails(failing: str) -> None:
    loss_fn = NegativeCacheLoss(M, D, refresh_fraction=0.2)
    z1, z2 = views(0)
    loss_fn(z1, z2, torch.arange(B))
    before = copy.deepcopy(loss_fn.state_dict())
    asked = []

    def encode(ids: Tensor) -> Tensor:
        asked.append(ids)
        if len(asked) == (1 if failing == "refresh" else 2):
            raise OSError("no such image")
        return torch.randn(len(ids), D, dtype=torch.float64)

    with pytest.raises(OSError, match="no such image"):
        loss_fn(z1, z2, torch.arange(5, 10), encode=encode)
    torch.testing.assert_close(loss_fn.state_dict(), before, rtol=0, atol=0)


def test_negative_cache_refreshes_without_gradient_and_draws_with_it() -> None:
    z1, z2 = views(0)
    modes = []

    def encode(ids: Tensor) -> Tensor:
        modes.append((len(ids), torch.is_grad_enabled()))
        return torch.randn(len(ids), D, dtype=torch.float64)

    NegativeCacheLoss(M, D, refresh_fraction=0.7)(z1, z2, torch.arange(B), encode=encode)
    assert modes[0] == (14, False)
    assert modes[1][1]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.01, 1), (0.07, 2), (0.125, 3), (0.5, 10), (1.0, 20)])
def test_negative_cache_refreshes_its_share_rounded_up(fraction: float, count: int) -> None:
    """Of a small cache a small share would else be nothing, for ever."""
    loss_fn, asked = NegativeCacheLoss(20, D, refresh_fraction=fraction), []

    def encode(ids: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # what is drawn is encoded with it
            asked.append(len(ids))
        return torch.randn(len(ids), D, dtype=torch.float64)

    for step in range(3):
        loss_fn(*views(step), torch.arange(B), encode=encode)
    assert asked == [count] * 3 if count else asked == []


def test_negative_cache_draws_the_nearest_where_all_noise_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw of exactly zero is rare and comes; the row's own entry, the nearest of all, must not win by it."""
    zeros = SimpleNamespace(exponential=lambda *shape: torch.zeros(2 * B, *shape, dtype=torch.float64))
    monkeypatch.setattr("torch_emc2.losses.draws.BatchDraws.of", lambda *_: zeros)
    loss_fn = NegativeCacheLoss(M, D, refresh_fraction=0)
    z1, z2 = views(0)
    loss = loss_fn(z1, z2, torch.arange(B))
    z, expected = F.normalize(torch.cat([z1, z2]), dim=1), torch.zeros((), dtype=torch.float64)
    for row, (positive, _) in enumerate(rows_of(z1, z2, 0.07)):
        others = torch.stack([z[j] for j in range(B) if j != row % B]).detach() @ z[row] / 0.07
        w_pos = (positive - torch.logaddexp(positive, others.logsumexp(0))).exp().detach()
        expected = expected + (1 - w_pos) * (others.max() - positive) / (2 * B)
    got, want = (torch.autograd.grad(each, (z1, z2)) for each in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_negative_cache_is_not_evaluated_empty() -> None:
    with pytest.raises(ValueError, match="the cache is empty: train before you evaluate, or load a state"):
        NegativeCacheLoss(M, D).eval()(*views(0), torch.arange(B))


def test_negative_cache_takes_one_embedding_an_id() -> None:
    loss_fn = NegativeCacheLoss(M, D, refresh_fraction=0.2)
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(ValueError, match=r"encode must return \(4, 6\) for 4 ids, got \(4, 2, 6\)"):
        loss_fn(*views(0), torch.arange(B), encode=lambda ids: torch.randn(len(ids), 2, D))
    torch.testing.assert_close(loss_fn.state_dict(), before, rtol=0, atol=0)


def test_negative_cache_names_another_dimension() -> None:
    loss_fn = NegativeCacheLoss(M, D + 1)
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(ValueError, match=f"embeddings of dim={D + 1}, the batch has {D}"):
        loss_fn(*views(0), torch.arange(B))
    torch.testing.assert_close(loss_fn.state_dict(), before, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_negative_cache_on_another_device_than_the_batch() -> None:
    loss_fn, other = NegativeCacheLoss(M, D), NegativeCacheLoss(M, D)
    for table in (loss_fn.sides[0].embeddings, loss_fn.sides[0].written):
        table.share_memory()
    for step in range(3):
        z1, z2 = (z.detach().cuda() for z in views(step))
        losses = [each(z1, z2, torch.arange(B).cuda()) for each in (loss_fn, other)]
        torch.testing.assert_close(losses[0], losses[1])
    loaded = NegativeCacheLoss(M, D).eval()
    loaded.load_state_dict(loss_fn.state_dict())
    torch.testing.assert_close(loaded(z1, z2, torch.arange(B).cuda()), loss_fn.eval()(z1, z2, torch.arange(B).cuda()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"views_per_sample": 0}, ValueError, "views_per_sample must be at least 1, got 0"),
        ({"dim": 0}, ValueError, "dim must be at least 1.*got 0"),
        ({"dim": 8.0}, TypeError, "dim must be an int, got 8.0"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got 0.5"),
        ({"seed": True}, TypeError, "seed must be an int, got True"),
        ({"num_samples": 10.0}, TypeError, "num_samples must be an int, got 10.0"),
        ({"num_samples": None}, TypeError, "num_samples must be an int, got None"),
    ],
)
def test_negative_cache_names_bad_settings(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NegativeCacheLoss(**({"num_samples": M, "dim": D} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [True, "0.1", torch.tensor(0.1), np.array(0.1), None])
def test_a_temperature_that_is_no_number_is_named(temperature: object) -> None:
    with pytest.raises(TypeError, match=r"temperature must be a number, such as 0\.07, got"):
        DCLLoss(temperature)  # type: ignore[arg-type]


def test_numbers_of_numpy_will_do() -> None:
    loss_fn = SogCLRLoss(np.int64(M), np.float32(0.5))
    assert type(loss_fn.temperature) is float
    assert loss_fn.temperature == 0.5
    assert type(loss_fn.num_samples) is int


def test_where_there_is_no_room_for_new_samples_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    for loss_fn, table in ((SogCLRLoss(None), "log_u"), (EMC2Loss(None), "embeddings")):
        loss_fn(*views(0), torch.arange(B))
        before = copy.deepcopy(loss_fn.state_dict())
        monkeypatch.setattr(getattr(loss_fn.sides[0], table), "make_room", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            loss_fn(*views(1), torch.arange(B) + 3)
        torch.testing.assert_close(loss_fn.state_dict(), before, rtol=0, atol=0)


def test_negative_cache_encodes_a_forgotten_sample_no_more() -> None:
    loss_fn, asked = NegativeCacheLoss(M, D, refresh_fraction=1), []

    def encode(ids: Tensor) -> Tensor:
        asked.extend(ids.tolist())
        return torch.randn(len(ids), D, dtype=torch.float64)

    loss_fn.forget(torch.tensor([7, M - 1]))
    for step in range(2):
        loss_fn(*views(step), torch.arange(B), encode=encode)
    assert set(asked) == set(range(M)) - {7, M - 1}
    loss_fn(*views(2), torch.arange(B) + 5, encode=encode)  # 7 is back
    assert set(asked) == set(range(M)) - {M - 1}


def test_negative_cache_keeps_nothing_of_a_forgotten_sample() -> None:
    loss_fn = NegativeCacheLoss(M, D)
    loss_fn(*views(0), torch.arange(B))
    before = loss_fn.get_extra_state()["embeddings"].clone()
    loss_fn.forget(torch.tensor([1, 3, M - 1]))
    assert before[:B].any(1).all()
    before[[1, 3]] = 0
    assert torch.equal(loss_fn.get_extra_state()["embeddings"], before)


ALL = [InfoNCELoss(0.1), DCLLoss(0.1), SogCLRLoss(M, 0.1), NegativeCacheLoss(M, D, 0.1)]


@pytest.mark.parametrize("loss_fn", ALL, ids=lambda loss_fn: type(loss_fn).__name__)
def test_global_loss_is_reported_alike_and_is_zero_at_collapse(loss_fn: ContrastiveLoss) -> None:
    z1, z2 = views(0)
    loss_fn(z1, z2, torch.arange(B))
    expected = [negatives.logsumexp(0) - math.log(2 * B - 2) - positive for positive, negatives in rows_of(z1, z2, 0.1)]
    torch.testing.assert_close(loss_fn.last["global_loss"], torch.stack(expected).mean().detach())
    torch.testing.assert_close(loss_fn.last["positive_similarity"], F.cosine_similarity(z1, z2).mean().detach())
    one = torch.ones(B, D)
    loss_fn(one, one, torch.arange(B))
    assert loss_fn.last["global_loss"].abs() < 1e-5


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_sogclr_names_a_bad_gamma(gamma: float) -> None:
    with pytest.raises(ValueError, match=rf"gamma must be in \(0, 1\], got {gamma}"):
        SogCLRLoss(M, gamma=gamma)


def test_negative_cache_names_a_bad_fraction() -> None:
    with pytest.raises(ValueError, match=r"refresh_fraction must be in \[0, 1\].*got 2"):
        NegativeCacheLoss(M, D, refresh_fraction=2)


def test_negative_cache_without_another_sample_is_no_nan() -> None:
    loss_fn = NegativeCacheLoss(4, D)
    z = torch.randn(2, 2, D)
    loss_fn(*z, torch.tensor([0, 1]))
    loss_fn.forget(torch.tensor([1]))
    with pytest.raises(ValueError, match="no entry of another sample for some row"):
        loss_fn.eval()(*z, torch.tensor([0, 2]))
