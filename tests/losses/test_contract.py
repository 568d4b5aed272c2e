"""What every loss promises: one call, checked input, saved state, and the same on many ranks as on one."""

import contextlib
import copy
import datetime
import functools
import gc
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import geometries
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from slowed import Slowed
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss, Temperature, UniformityLoss
from torch_emc2.batch import NoNegatives
from torch_emc2.kernels import Metropolis
from torch_emc2.losses import ContrastiveLoss
from torch_emc2.losses.registry import ESTIMATORS, LossContext
from torch_emc2.losses.stateful import PerSampleLoss, StatefulLoss
from torch_emc2.ranks import gather_with_gradient
from torch_emc2.settings.losses import EMC2Config, NegativeCacheConfig

M, D = 40, 8

SMALL = {  # settings for so few samples, where a variant has no others
    "emc2": EMC2Config(burn_in=0.1, carry="cache", kernel="metropolis"),
    "negative_cache": NegativeCacheConfig(refresh_fraction=0.1),
}


def _makers() -> Iterator[tuple[str, Callable[[], ContrastiveLoss]]]:
    """Give every variant in the registry, and one of each estimator that can leave its number of samples open."""
    given = LossContext(M, 0.1, D, views_per_sample=2)
    for row in ESTIMATORS.values():
        if row.loss.needs_slow:
            row = replace(row, build=lambda own, given: Slowed(given.temperature, num_samples=given.num_samples))
        own = SMALL.get(row.group)
        for label, fields in row.variants.items():
            yield f"{row.name}-{label}".rstrip("-"), functools.partial(row.maker(fields, given, own), 0)
        if issubclass(row.loss, StatefulLoss):
            keyed = functools.partial(row.maker({}, given._replace(num_samples=None), own), 0)
            with contextlib.suppress(TypeError):
                keyed()
                yield f"{row.name}-keyed", keyed


MAKERS = dict(_makers())
STATEFUL = [name for name in MAKERS if isinstance(MAKERS[name](), StatefulLoss)]
PER_SAMPLE = [name for name in MAKERS if isinstance(MAKERS[name](), PerSampleLoss)]
REMEMBERING = [name for name in MAKERS if MAKERS[name]().state_dict()]
each_loss = pytest.mark.parametrize("name", MAKERS)
each_stateful_loss = pytest.mark.parametrize("name", STATEFUL)
each_per_sample_loss = pytest.mark.parametrize("name", PER_SAMPLE)
each_loss_that_remembers = pytest.mark.parametrize("name", REMEMBERING)


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
        ({"x": torch.zeros(6)}, ValueError, r"\(b, d\), got \(6,\)"),
        ({"y": torch.zeros(5, D)}, ValueError, r"\(6, 8\) and \(5, 8\)"),
        (
            {"x": torch.zeros(6, D, dtype=torch.int64), "y": torch.zeros(6, D, dtype=torch.int64)},
            TypeError,
            "floating",
        ),
        ({"y": torch.ones(6, D, dtype=torch.float64)}, TypeError, "share .* got torch.float32 and torch.float64"),
        ({"x": torch.ones(1, D), "y": torch.ones(1, D), "index": torch.tensor([0])}, ValueError, "batch of 1"),
        ({"y": torch.ones(6, D).index_fill(0, torch.tensor([4]), torch.nan)}, ValueError, r"y\[4\] is not finite"),
        ({"x": torch.ones(6, D).index_fill(0, torch.tensor([2]), torch.inf)}, ValueError, r"x\[2\] is not finite"),
        ({"x": torch.ones(6, D).index_fill(0, torch.tensor([5]), 0.0)}, ValueError, r"x\[5\] has length 0 and so no"),
    ],
)
def test_bad_views_are_named(name: str, change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = {"x": torch.randn(6, D), "y": torch.randn(6, D), "index": torch.arange(6)}
    loss_fn = MAKERS[name]()
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(error, match=message):
        loss_fn(**(good | change), encode=table().float().__getitem__)
    assert_same(loss_fn.state_dict(), before)


@each_stateful_loss
@pytest.mark.parametrize("grad", [False, True])
def test_encode_has_a_graph_where_the_caller_has_and_the_loss_needs_it(name: str, grad: bool) -> None:
    rows, graphs, loss_fn = table().requires_grad_(), [], MAKERS[name]()

    def encode(ids: Tensor) -> Tensor:
        graphs.append(rows[ids].requires_grad)
        return rows[ids]

    with torch.set_grad_enabled(grad):
        for step in range(4):
            z1, z2, index = batch(step, 6)
            loss = loss_fn(z1, z2, index, encode=encode)
    if isinstance(loss_fn, NegativeCacheLoss):
        assert graphs == 4 * [False, grad]  # a refresh is a constant
    else:
        assert set(graphs) == ({grad} if str(getattr(loss_fn, "carry", "")).startswith("encode") else set())
    assert loss.requires_grad == (grad and any(graphs))


@each_stateful_loss
@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (None, ValueError, "needs index"),
        (torch.arange(5), ValueError, r"index must be \(6,\), or \(6, 2\).*got \(5,\)"),
        (torch.arange(6.0), TypeError, "integers, got torch.float32"),
        (torch.arange(6) > 2, TypeError, "integers, got torch.bool"),
        ([0, 1, 2, 3, 4, 5], TypeError, "index must be a tensor of integers, got list"),
        (torch.tensor([0, 1, 2, 3, 4, M]), IndexError, f"below num_samples={M}, got {M}"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), IndexError, "at least 0.*got -1"),
    ],
)
def test_bad_index_is_named(name: str, index: Tensor | None, error: type[Exception], message: str) -> None:
    loss_fn = MAKERS[name]()
    if index is None and not loss_fn.needs_index:
        pytest.skip("it does without")
    if loss_fn.num_samples is None and error is IndexError:
        message, index = "index -1 is reserved", torch.tensor([0, 1, 2**62, -3, M, -1])
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(error, match=message):
        loss_fn(torch.randn(6, D), torch.randn(6, D), index, encode=table().float().__getitem__)
    assert_same(loss_fn.state_dict(), before)


@each_stateful_loss
def test_an_index_of_any_integers_will_do(name: str) -> None:
    dtypes = (torch.int64, torch.uint8, torch.int16, torch.int32)
    losses = [MAKERS[name]() for _ in dtypes]
    for step in range(3):
        z1, z2, index = batch(step, 6)
        first, *others = (
            loss_fn(z1, z2, index.to(dtype), encode=table().__getitem__)
            for loss_fn, dtype in zip(losses, dtypes, strict=True)
        )
        for other in others:
            assert_same(other, first)
    for loss_fn in losses:
        assert_same(loss_fn.state_dict(), losses[0].state_dict())


@each_loss
@pytest.mark.parametrize("value", [torch.nn.Parameter(torch.tensor(0.2)), torch.tensor(0.2), 0.0, math.nan, None])
def test_a_temperature_that_is_assigned_is_checked(name: str, value: Any) -> None:
    loss_fn = MAKERS[name]()
    with pytest.raises((TypeError, ValueError), match="temperature must be a"):
        loss_fn.temperature = value
    assert loss_fn.temperature == 0.1
    assert not list(loss_fn.parameters())


@pytest.mark.parametrize("name", [name for name in MAKERS if "sogclr" not in name])
def test_a_schedule_of_temperatures(name: str) -> None:
    """What was remembered at one temperature is used at the next as if it had never been another."""
    scheduled = MAKERS[name]()
    for step, temperature in enumerate((0.05, 1.0, 0.05, 0.3)):
        scheduled.temperature = temperature
        fresh = MAKERS[name]()
        fresh.load_state_dict(scheduled.state_dict(), strict=name in STATEFUL)
        fresh.temperature = temperature
        want = step_of(fresh, step)
        assert_same(step_of(scheduled, step), want)
        assert_same(scheduled.state_dict(), fresh.state_dict())
    if name not in STATEFUL:
        assert_same(step_of(scheduled, 0)[0], step_of(type(scheduled)(0.3), 0)[0])


@pytest.mark.parametrize("name", ["sogclr-γ = 0.9", "sogclr-keyed"])
def test_averages_of_another_temperature_are_refused(name: str) -> None:
    loss_fn, other = MAKERS[name](), MAKERS[name]()
    other.temperature = 0.5  # nothing is remembered yet
    assert_same(step_of(other, 0), step_of(SogCLRLoss(M, 0.5), 0))
    step_of(loss_fn, 0)
    before = copy.deepcopy(loss_fn.state_dict())
    refused = functools.partial(pytest.raises, ValueError)
    z1, z2, index = batch(1, 6)
    loss_fn.temperature = 0.5
    with refused(match=r"are of temperature 0\.1 and cannot be converted to 0\.5: forget\(ids\)"):
        loss_fn(z1, z2, index)
    loss_fn.temperature = Temperature(0.5)
    with refused(match=r"are of temperature 0\.1 and cannot be converted to 0\.5"):
        loss_fn(z1, z2, index)
    loss_fn.temperature = 0.1  # is what it was
    with refused(match=r"are of temperature 0\.1 and cannot be converted to 0\.01"):
        loss_fn.eval()(z1, z2, index, logit_scale=100.0)
    assert_same(loss_fn.train().state_dict(), before)
    loaded = MAKERS[name]()
    loaded.load_state_dict(other.state_dict())
    with refused(match=r"are of temperature 0\.5 and cannot be converted to 0\.1"):
        loaded(z1, z2, index)
    loaded.temperature = 0.2  # near enough, as one that is learnt
    step_of(loaded, 1)
    with refused(match=r"are of temperature 0\.2 and cannot be converted to 0\.64"):
        loaded(z1, z2, index, logit_scale=1 / 0.64)
    loss_fn.forget(batch(0, 6)[2])  # type: ignore[operator]
    loss_fn.temperature = 0.5
    assert_same(step_of(loss_fn, 1), step_of(SogCLRLoss(M, 0.5), 1))


@pytest.mark.parametrize("make", [functools.partial(SogCLRLoss, M), UniformityLoss])
def test_averages_with_another_weight_of_the_positive_are_refused(make: Any) -> None:
    saved = make(positive_weight=1.0)
    step_of(saved, 0)
    sized = {"num_samples": M} if make is UniformityLoss else {}
    for other, named in ((0.0, "0"), ("global", f"'global' of {M} samples")):
        loss_fn = make(positive_weight=other, **sized)
        before = copy.deepcopy(loss_fn.state_dict())
        with pytest.raises(ValueError, match=rf"averages are of positive_weight=1, this loss has {named}"):
            loss_fn.load_state_dict(saved.state_dict())
        assert_same(loss_fn.state_dict(), before)
        loss_fn.load_state_dict(make(positive_weight=1.0).state_dict())  # has no averages yet


def test_averages_of_other_data_are_refused_where_these_count() -> None:
    saved, other = (UniformityLoss(positive_weight="global", num_samples=size) for size in (M, 100 * M))
    step_of(saved, 0)
    with pytest.raises(ValueError, match=rf"'global' of {M} samples, this loss has 'global' of {100 * M} samples"):
        other.load_state_dict(saved.state_dict())


@each_loss
def test_labels_in_the_place_of_embeddings_are_told_of(name: str) -> None:
    z1, _, index = batch(0, 6)
    for labels in (index, index[:, None], index > 2):
        with pytest.raises(TypeError, match=r"y must be embeddings as x, \(6, 8\), got torch\.(int64|bool) "):
            MAKERS[name]()(z1, labels)


def test_chains_hold_ids_of_the_other_side_however_large() -> None:
    loss_fn = EMC2Loss((100, None), 0.5, towers=2)
    far, x = 2**40 + torch.arange(6), torch.eye(6)
    for _ in range(3):
        loss_fn(x, x, torch.arange(6), y_index=far)
    of_x, of_y = (side.chains.ids.data for side in loss_fn.sides)
    assert set(of_x[:6].flatten().tolist()) <= set(far.tolist())
    assert of_x[:6].ne(-1).any()
    assert of_y.dtype == torch.int32


@each_loss
def test_an_empty_batch_is_refused(name: str) -> None:
    z1, z2, index = batch(0, 6)
    with pytest.raises(NoNegatives, match="an empty batch has no negatives"):
        MAKERS[name]()(z1[:0], z2[:0], index[:0], encode=table().__getitem__)


@each_loss
def test_the_default_dtype_makes_no_difference(name: str) -> None:
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            loss_fn, rows, losses = MAKERS[name](), table().float(), []
            for step in range(3):
                z1, z2, index = batch(step, 6)
                losses.append(loss_fn(z1.float(), z2.float(), index, encode=rows.__getitem__))
        finally:
            torch.set_default_dtype(torch.float32)
        outcomes.append((losses, loss_fn.state_dict()))
    assert_same(outcomes[0], outcomes[1])


@each_loss
def test_nothing_of_the_size_of_the_similarities_outlives_a_step(name: str) -> None:
    def large() -> int:
        gc.collect()
        return sum(type(each) is Tensor and each.numel() >= (2 * M - 2) ** 2 for each in gc.get_objects())

    before = large()
    for size in (M, M - 1):  # as a last batch is smaller, or one with images left out
        z1, z2, index = batch(0, M)
        loss_fn = MAKERS[name]()
        loss_fn(z1[:size].requires_grad_(), z2[:size], index[:size], encode=table().__getitem__).backward()
    assert large() == before


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
        assert differs == (name in REMEMBERING), f"{name}: does its state make a difference?"
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


@each_loss_that_remembers
def test_evaluation_reads_and_does_not_write(name: str) -> None:
    loss_fn = MAKERS[name]()
    for step in range(3):
        step_of(loss_fn, step)
    before = copy.deepcopy(loss_fn.state_dict())
    evaluated = step_of(loss_fn.eval(), 3)
    assert_same(loss_fn.state_dict(), before)
    if name != "negative-cache":  # there the batch enters the cache before it is used
        assert_same(evaluated, step_of(loss_fn.train(), 3))


@each_per_sample_loss
def test_ids_to_forget_are_checked(name: str) -> None:
    loss_fn = MAKERS[name]()
    step_of(loss_fn, 0)
    before = copy.deepcopy(loss_fn.state_dict())
    bad = M if loss_fn.num_samples is not None else -1
    with pytest.raises(IndexError, match=f"index.* {bad}"):
        loss_fn.forget(torch.tensor([0, bad]))
    with pytest.raises(TypeError, match=r"integers, got torch\.float32"):
        loss_fn.forget(torch.zeros(2))
    assert_same(loss_fn.state_dict(), before)
    loss_fn.forget(torch.tensor([], dtype=torch.int64))
    assert_same(loss_fn.state_dict(), before)


@each_per_sample_loss
def test_a_loss_that_forgets_all_is_new(name: str) -> None:
    loss_fn = MAKERS[name]()
    step_of(loss_fn, 0)
    with torch.inference_mode():
        loss_fn.forget(torch.arange(M).view(2, -1))
    state = loss_fn.get_extra_state()
    state |= {"calls": 0} if "calls" in state else {}
    loss_fn.load_state_dict({"_extra_state": state})
    assert_same(step_of(loss_fn, 1)[:3], step_of(_new(name), 1)[:3])


def _new(name: str) -> ContrastiveLoss:
    loss_fn = MAKERS[name]()
    if isinstance(loss_fn, NegativeCacheLoss):
        loss_fn.forget(torch.arange(M))  # or the first step would encode the oldest, which are all
    return loss_fn


@each_loss
def test_inference_mode_does_not_spoil_training(name: str) -> None:
    tested, plain = MAKERS[name](), MAKERS[name]()
    for step in range(3):
        if step or not isinstance(tested, NegativeCacheLoss):  # whose cache is empty at first
            tested.eval()
            with torch.inference_mode():
                z1, z2, index = batch(step + 9, 6)
                tested(z1, z2, index, encode=table().__getitem__)
            tested.train()
        assert_same(step_of(tested, step), step_of(plain, step))


def test_weights_are_chosen_without_gradient() -> None:
    class Loss(DCLLoss):
        def _weighing(self, *args: Any) -> Any:
            weighing = super()._weighing(*args)
            weigh, conclude = weighing.weigh, weighing.conclude
            weighing.weigh = lambda *args: modes.append(torch.is_grad_enabled()) or weigh(*args)  # type: ignore
            weighing.conclude = lambda *args: modes.append(torch.is_grad_enabled()) or conclude(*args)  # type: ignore
            return weighing

    modes: list[bool] = []
    z1, z2, _ = batch(0, 6)
    assert Loss(0.1)(z1.requires_grad_(), z2).requires_grad
    assert modes == [False, False]


@each_stateful_loss
def test_a_loaded_state_takes_the_place_of_all_there_was(name: str) -> None:
    used, saved = MAKERS[name](), MAKERS[name]()
    for step in range(3):
        step_of(used, step)
    if isinstance(used, PerSampleLoss):
        used.forget(batch(0, 6)[2])
    step_of(saved, 3)
    used.load_state_dict(saved.state_dict())
    for step in (4, 5, 6):
        assert_same(step_of(used, step), step_of(saved, step))
    assert_same(used.state_dict(), saved.state_dict())


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
        (EMC2Loss(None), EMC2Loss(None, num_chains=2)),
        (NegativeCacheLoss(M, D), NegativeCacheLoss(M, D + 1)),
    ],
)
def test_state_of_another_size_is_refused(small: ContrastiveLoss, large: ContrastiveLoss) -> None:
    with pytest.raises(ValueError, match="the saved table is"):
        large.load_state_dict(small.state_dict())


def _damaged(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies of a state with one thing wrong in each."""
    yield {**state, "other": 0}
    for name, value in state.items():
        yield {other: kept for other, kept in state.items() if other != name}
        wrong: list[Any] = []
        if isinstance(value, dict):
            wrong = list(_damaged(value))
        elif isinstance(value, Tensor):
            other = torch.int64 if value.is_floating_point() else torch.float32
            wrong = [value[:-1], value[..., None], value.nan_to_num(neginf=0).to(other), "table", None]
        elif isinstance(value, int):
            wrong = [None, "number"]
        yield from ({**state, name: each} for each in wrong)


@each_stateful_loss
def test_a_damaged_state_is_refused_and_changes_nothing(name: str) -> None:
    loss_fn, saved = MAKERS[name](), MAKERS[name]()
    for step in range(2):
        step_of(loss_fn, step)
        step_of(saved, step + 2)
    before = copy.deepcopy(loss_fn.state_dict())
    for state in _damaged(saved.get_extra_state()):
        with pytest.raises(ValueError, match=r"saved"):
            loss_fn.load_state_dict({"_extra_state": state})
        assert_same(loss_fn.state_dict(), before)
    loss_fn.load_state_dict(saved.state_dict())
    assert_same(loss_fn.state_dict(), saved.state_dict())


SIZES = {1: (6,), 2: (4, 2), 4: (3, 1, 2, 2)}  # samples of each rank, by their number: they may differ
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}
STEPS = 4


def _broken(change: str, part: list[Any], rank: int) -> tuple[list[Any], Callable[[Tensor], Tensor] | None]:
    """A rank's part and encode, with something wrong on rank 1."""
    calls = 0

    def encode(ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and (change, calls) in (("first encode", 1), ("second encode", 2)):
            raise OSError("no such image")
        return table()[ids]

    z1, z2, index = part
    if rank == 1:
        match change:
            case "nan":
                z2 = z2.clone().fill_(torch.nan)
            case "shape":
                z1 = z1[:, None]
            case "empty":
                z1, z2, index = z1[:0], z2[:0], index[:0]
            case "dimension":
                z1, z2 = z1[:, 1:], z2[:, 1:]
            case "dtype":
                z1, z2 = z1.float(), z2.float()
            case "no index":
                index = None
            case "index form":
                index = torch.stack([index, index + M // 2], 1)
            case "index length":
                index = index[:-1]
            case "id":
                index = index - M
    return [z1, z2, index], None if change == "no encode" and rank == 1 else encode


UNUSABLE = "rank 1 has unusable input"
AGREE = r"ranks must agree in {}: rank 0 has {}, rank 1 {}; no state has changed"
FAILURES = {  # what is wrong on rank 1: what it raises itself, and what the other ranks raise
    "nan": (r"ValueError: y\[0\] is not finite", f"ValueError: {UNUSABLE}"),
    "shape": (r"ValueError: .* must both be \(b, d\)", f"ValueError: {UNUSABLE}"),
    "empty": ("ValueError: rank 1 has an empty batch",) * 2,
    "dimension": ("ValueError: " + AGREE.format("dimension d", D, D - 1),) * 2,
    "dtype": ("ValueError: " + AGREE.format("bytes a number of float", 8, 4),) * 2,
    "no index": ("ValueError: this loss needs index", f"ValueError: {UNUSABLE}"),
    "index form": ("ValueError: " + AGREE.format("dimensions of index", 1, 2),) * 2,
    "index length": (r"ValueError: index must be \(", f"ValueError: {UNUSABLE}"),
    "id": ("IndexError: index must be at least 0",) * 2,
    "no encode": ("ValueError: " + AGREE.format("encode", True, False),) * 2,
    "first encode": ("OSError: no such image", "ValueError: rank 1 failed .* no state has changed"),
    "second encode": ("OSError: no such image", "ValueError: rank 1 failed .* no state has changed"),
}
SETTINGS = {  # and what rank 1 has otherwise
    "temperature": 0.1000001,
    "num_samples": M + 1,
    "seed": 7,
    "burn_in": 0.2,
    "num_chains": 5,
    "carry": "other",
    "kernel": "other",
    "gamma": 0.5,
    "refresh_fraction": 0.3,
    "views_per_sample": 3,
    "queue_size": 9,
}
HISTORIES = {  # what rank 1 alone has done, and in what it is then said to differ
    "called": "number of the call: rank 0 has 1, rank 1 2",
    "forgot": r"checksum of what was loaded and forgotten: rank 0 has 0, rank 1 \d+",
    "loaded": r"checksum of what was loaded and forgotten: rank 0 has \d+, rank 1 \d+",
    "averaged elsewhere": r"temperature of the averages: rank 0 has \[0\.1\], rank 1 \[0\.2\]",
}
OF_VIEWS = ("nan", "shape", "empty", "dimension", "dtype")
OF_CALLS = {  # of encode in one step, for losses that are sure to call it
    "negative-cache": ("first encode", "second encode"),
    "emc2-encode": ("first encode",),
    "emc2-isir": ("first encode",),
}
FAILURE_CASES = [
    (name, change)
    for name in MAKERS
    for change in FAILURES
    if change in OF_VIEWS
    or (name in STATEFUL and change not in ("first encode", "second encode", "id", "no index"))
    or (change == "no index" and MAKERS[name]().needs_index)
    or (change == "id" and name in PER_SAMPLE and "keyed" not in name)  # where all ids are good
    or change in OF_CALLS.get(name, ())
]


DIFFERENCES = [
    (name, change)
    for name in MAKERS
    for change in ("loss", *SETTINGS, *HISTORIES)
    if change in ("loss", "temperature")
    or (name in STATEFUL and change in {**vars(MAKERS[name]()), "called": ..., "loaded": ...})
    or (name in PER_SAMPLE and change == "forgot")
    or ("sogclr" in name and change == "averaged elsewhere")
]


def _train(name: str, own_ids: bool, dtype: torch.dtype, sizes: tuple[int, ...], rank: int) -> tuple[Any, Any]:
    """Losses and gradients of some steps on a rank's part of each batch, and the state after them."""
    loss_fn, steps = MAKERS[name](), []
    for step in range(STEPS):
        z1, z2, index = (part.split(sizes)[rank] for part in batch(step, sum(sizes), own_ids))
        inputs = [z.to(dtype, copy=True).requires_grad_() for z in (z1, z2, table())]
        loss = loss_fn(inputs[0], inputs[1], index, encode=inputs[2].__getitem__)
        gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
        steps.append([loss.detach(), *gradients])
    return steps, loss_fn.state_dict()


def _fail(name: str, change: str, sizes: tuple[int, ...], rank: int) -> str:
    """What a bad call raises on this rank, having changed nothing."""
    loss_fn = MAKERS[name]()
    part = [part.split(sizes)[rank] for part in batch(0, sum(sizes))]
    loss_fn(*part, encode=table().__getitem__)
    before = copy.deepcopy(loss_fn.state_dict())
    bad, encode = _broken(change, part, rank)
    try:
        loss_fn(*bad, encode=encode)
    except Exception as error:
        assert_same(loss_fn.state_dict(), before)
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _another(name: str) -> type[InfoNCELoss | DCLLoss]:
    return DCLLoss if name == "infonce" else InfoNCELoss


def _differ(name: str, change: str, sizes: tuple[int, ...], rank: int) -> str:
    """What a good call raises on this rank where rank 1 is otherwise than the others, having changed nothing."""
    loss_fn = MAKERS[name]()
    part = [part.split(sizes)[rank] for part in batch(0, sum(sizes))]
    loss_fn(*part, encode=table().__getitem__)
    if change == "loaded":
        state = copy.deepcopy(loss_fn.get_extra_state())
        if rank == 1:
            tree_map_only(Tensor, lambda tensor: tensor.view(-1)[-1].fill_(3), {**state, "keys": None})
        loss_fn.set_extra_state(state)
    elif rank == 1:
        if change == "loss":
            loss_fn = _another(name)(0.1)
        elif change in SETTINGS:
            vars(loss_fn)[change] = SETTINGS[change]
        elif change == "called":
            loss_fn._calls += 1  # type: ignore[operator]
        elif change == "averaged elsewhere":
            loss_fn.sides[0].temperature *= 2  # type: ignore[index, union-attr]
        else:
            loss_fn.forget(part[2][:1])  # type: ignore[operator]
    before = copy.deepcopy(loss_fn.state_dict())
    try:
        loss_fn(*part, encode=table().__getitem__)
    except ValueError as error:
        assert_same(loss_fn.state_dict(), before)
        return str(error)
    return "nothing"


def _last(name: str, sizes: tuple[int, ...], rank: int) -> list[dict[str, Tensor]]:
    """The numbers for logs after each of some steps."""
    loss_fn, numbers = MAKERS[name](), []
    for step in range(STEPS):
        loss_fn(*(part.split(sizes)[rank] for part in batch(step, sum(sizes))), encode=table().__getitem__)
        numbers.append(loss_fn.last)
    return numbers


def _random_refresh(sizes: tuple[int, ...], rank: int) -> tuple[Any, int]:
    """The state after refreshes by an encoder that is another on each rank, and how many entries it was asked for."""
    loss_fn, generator, calls = NegativeCacheLoss(M, D, refresh_fraction=0.3), torch.Generator().manual_seed(rank), []

    def encode(ids: Tensor) -> Tensor:
        calls.append(len(ids))
        return torch.randn(len(ids), D, dtype=torch.float64, generator=generator)

    for step in range(3):
        z1, z2, index = (part.split(sizes)[rank] for part in batch(step, sum(sizes)))
        loss_fn(z1, z2, index, encode=encode)
    return loss_fn.state_dict(), sum(calls[::2])


class Counting(torch.nn.Linear):
    """An encoder with a buffer, which DDP exchanges in every forward pass of its own."""

    def __init__(self) -> None:
        super().__init__(D, D, bias=False, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))
        torch.nn.init.eye_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def _wrapped(sizes: tuple[int, ...], rank: int) -> list[Tensor]:
    """Gradients of an encoder's weights where the batch goes through DDP, and carried negatives through its module."""
    loss_fn, module = EMC2Loss(M, 0.1, carry="encode_if_used"), Counting()
    wrapped = DistributedDataParallel(module) if len(sizes) > 1 else module
    gradients = []
    for step in range(2 * STEPS):
        z1, z2, index = (part.split(sizes)[rank] for part in batch(step, sum(sizes)))
        loss_fn(*wrapped(torch.cat([z1, z2])).chunk(2), index, encode=lambda ids: module(table()[ids])).backward()
        gradients.append(module.weight.grad.clone())  # type: ignore[union-attr]
        module.zero_grad()
    return gradients


class Collective(torch.autograd.Function):
    """Nothing, at which ranks wait for one another both ways, as they do in a sharded module."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        dist.all_reduce(torch.ones(1))
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        dist.all_reduce(torch.ones(2))
        return gradients[0]


UNEQUAL: dict[str, Callable[[], ContrastiveLoss]] = {  # where a rank may have nothing to encode
    **{name: MAKERS[name] for name in ("emc2-encode", "emc2-encode_if_used", "emc2-isir")},
    "negative-cache": lambda: NegativeCacheLoss(M, D, 0.1, refresh_fraction=0.01),  # one entry a step, on one rank
}


def unequal_batch(step: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The first rank has the same samples in each step, the others new ones, whose chains are empty."""
    z1, z2, _ = batch(step, sum(sizes))
    others = sum(sizes[1:])
    return z1, z2, torch.cat([torch.arange(sizes[0]), sizes[0] + step * others + torch.arange(others)])


def _unequal(name: str, sizes: tuple[int, ...], rank: int, *, alone: bool = False) -> list[tuple[list[Tensor], Any]]:
    """Loss, gradients, and the numbers of ids that encode was asked for, where it waits for other ranks."""
    loss_fn, steps = UNEQUAL[name](), []
    for step in range(7):
        whole = unequal_batch(step, sizes)
        z1, z2, index = whole if alone else (part.split(sizes)[rank] for part in whole)
        inputs, asked = [tensor.clone().requires_grad_() for tensor in (z1, z2, table())], []

        def encode(ids: Tensor, asked: list[int] = asked, rows: Tensor = inputs[2]) -> Tensor:
            asked.append(len(ids))
            return rows[ids] if alone else Collective.apply(rows[ids])

        loss = loss_fn(inputs[0], inputs[1], index, encode=encode)
        steps.append(([loss.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)], asked))
    return steps


def _sharded(sizes: tuple[int, ...], rank: int, *, alone: bool = False) -> list[Tensor]:
    """Gradients of an encoder whose weights are split among the ranks, and that encodes the carried negatives too."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(D, 6), torch.nn.Tanh(), torch.nn.Linear(6, D)).double()
    if not alone:
        mesh = init_device_mesh("cpu", (len(sizes),))
        fully_shard(encoder[2], mesh=mesh)
        fully_shard(encoder, mesh=mesh)
    loss_fn, gradients = EMC2Loss(M, 0.1, kernel=Metropolis(0.1), carry="encode"), []
    for step in range(STEPS):
        whole = unequal_batch(step, sizes)
        z1, z2, index = whole if alone else (part.split(sizes)[rank] for part in whole)
        z = encoder(torch.cat([z1, z2]))
        loss_fn(*z.chunk(2), index, encode=lambda ids: encoder(table()[ids])).backward()
        by_weight = [parameter.grad for parameter in encoder.parameters()]
        gradients += [grad.clone() if alone else grad.full_tensor() for grad in by_weight]  # type: ignore[union-attr]
        encoder.zero_grad()
    return gradients


def _second_derivative(sizes: tuple[int, ...], rank: int) -> str:
    """What a second derivative through the gathered batch raises."""
    part = torch.randn(sizes[rank], D, requires_grad=True)
    gathered = gather_with_gradient(part, sizes, rank)
    (gradient,) = torch.autograd.grad(gathered.square().sum(), part, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def _rank(rank: int, folder: str, sizes: tuple[int, ...]) -> None:
    """Write down all that is tested on several ranks. A rank that waits in vain for another raises at the timeout."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(sizes), timeout=timeout
    )
    steps = {(*case, dtype): _train(*case, dtype, sizes, rank) for case in CASES for dtype in DTYPES}
    failures = {case: _fail(*case, sizes, rank) for case in FAILURE_CASES if len(sizes) > 1}
    results = {
        "steps": steps,
        "geometries": {name: geometries.train(name, sizes, rank) for name in geometries.CASES},
        "failures": failures,
        "differences": {case: _differ(*case, sizes, rank) for case in DIFFERENCES if len(sizes) > 1},
        "last": {name: _last(name, sizes, rank) for name in MAKERS},
        "refresh": _random_refresh(sizes, rank),
        "wrapped": _wrapped(sizes, rank),
        "unequal": {name: _unequal(name, sizes, rank) for name in UNEQUAL},
        "sharded": _sharded(sizes, rank),
        "second derivative": _second_derivative(sizes, rank),
    }
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank of a world of ``request.param`` ranks has written down."""
    folder, sizes = tmp_path_factory.mktemp("ranks"), SIZES[request.param]
    spawn(_rank, (str(folder), sizes), nprocs=len(sizes))  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(len(sizes))]


on_ranks = pytest.mark.parametrize("ranks", SIZES, indirect=True)
on_several_ranks = pytest.mark.parametrize("ranks", [size for size in SIZES if size > 1], indirect=True)


@functools.cache
def _whole(name: str, own_ids: bool, dtype: torch.dtype, size: int) -> tuple[Any, Any]:
    return _train(name, own_ids, dtype, (size,), 0)


@on_ranks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "own_ids"), CASES)
def test_ranks_equal_one_process(name: str, own_ids: bool, dtype: torch.dtype, ranks: list[Any]) -> None:
    parts, close = [results["steps"][name, own_ids, dtype] for results in ranks], DTYPES[dtype]
    steps, state = _whole(name, own_ids, dtype, sum(SIZES[len(ranks)]))
    for whole, *by_rank in zip(steps, *(part[0] for part in parts), strict=True):
        losses, by_z1, by_z2, by_table = zip(*by_rank, strict=True)
        # DDP averages the ranks' gradients of shared parameters; an embedding is on one rank and the others add
        # nothing.
        got = [sum(losses), torch.cat(by_z1), torch.cat(by_z2), sum(by_table)]
        assert_same([each / len(ranks) for each in got], whole, rtol=close, atol=close)
    for part in parts:
        assert_same(part[1], parts[0][1])
    # The tables are float32; ids are whole numbers, so that at these tolerances chains are identical.
    assert_same(parts[0][1], state, rtol=max(close, 1e-6), atol=max(close, 1e-6))


@on_ranks
@pytest.mark.parametrize("name", geometries.CASES)
def test_ranks_equal_one_process_in_both_geometries(name: str, ranks: list[Any]) -> None:
    """Value, gradients of embeddings, tables and β, and state."""
    steps, state = geometries.train(name, SIZES[len(ranks)])
    by_rank = [results["geometries"][name] for results in ranks]
    for whole, *parts in zip(steps, *(result[0] for result in by_rank), strict=True):
        assert_same(geometries.mean_over_ranks(parts), whole, rtol=1e-10, atol=1e-10)
    for _, after in by_rank:
        assert_same(after, by_rank[0][1])
    assert_same(by_rank[0][1], state, rtol=1e-6, atol=1e-6)


@on_ranks
@each_loss
def test_numbers_for_logs_average_over_ranks_to_the_whole_batchs(name: str, ranks: list[Any]) -> None:
    steps = _last(name, (sum(SIZES[len(ranks)]),), 0)
    for whole, *by_rank in zip(steps, *(results["last"][name] for results in ranks), strict=True):
        mean = {key: sum(each[key] for each in by_rank) / len(by_rank) for key in whole}
        assert_same(mean, whole, rtol=1e-6, atol=1e-6)


@on_several_ranks
@pytest.mark.parametrize(("name", "change"), FAILURE_CASES)
def test_ranks_fail_together(name: str, change: str, ranks: list[Any]) -> None:
    for rank, results in enumerate(ranks):
        assert re.match(FAILURES[change][rank != 1], results["failures"][name, change])


@on_several_ranks
@pytest.mark.parametrize(("name", "change"), DIFFERENCES)
def test_ranks_that_differ_are_told_in_what(name: str, change: str, ranks: list[Any]) -> None:
    loss_fn = MAKERS[name]()
    if change in HISTORIES:
        told = HISTORIES[change]
    elif change == "loss":
        told = f"loss: rank 0 has '{type(loss_fn).__name__}', rank 1 '{_another(name).__name__}'"
    else:
        told = re.escape(f"{change}: rank 0 has {getattr(loss_fn, change)!r}, rank 1 {SETTINGS[change]!r}")
    for results in ranks:
        assert re.fullmatch(rf"ranks must agree in {told}; no state has changed", results["differences"][name, change])


@on_ranks
def test_carried_negatives_go_through_the_wrapped_module(ranks: list[Any]) -> None:
    want = _wrapped((sum(SIZES[len(ranks)]),), 0)
    for results in ranks:
        assert_same(results["wrapped"], want, rtol=1e-10, atol=1e-10)


@on_several_ranks
@pytest.mark.parametrize("name", UNEQUAL)
def test_where_one_rank_encodes_all_do(name: str, ranks: list[Any]) -> None:
    sizes, stand_ins = SIZES[len(ranks)], 0
    alone = _unequal(name, sizes, 0, alone=True)
    for (want, asked), *by_rank in zip(alone, *(results["unequal"][name] for results in ranks), strict=True):
        losses, by_z1, by_z2, by_table = zip(*(got for got, _ in by_rank), strict=True)
        got = [sum(losses), torch.cat(by_z1), torch.cat(by_z2), sum(by_table)]
        assert_same([each / len(ranks) for each in got], want, rtol=1e-10, atol=1e-10)
        calls = [len(each) for _, each in by_rank]
        assert calls == [len(asked)] * len(ranks)
        stand_ins += sum(map(sum, (each for _, each in by_rank))) > sum(asked)
    assert stand_ins > 1, "all ranks had something to encode: this test shows nothing"


@on_several_ranks
def test_an_encoder_may_be_sharded(ranks: list[Any]) -> None:
    want = _sharded(SIZES[len(ranks)], 0, alone=True)
    for results in ranks:
        assert_same(results["sharded"], want, rtol=1e-10, atol=1e-10)


@on_ranks
def test_ranks_share_the_refresh(ranks: list[Any]) -> None:
    refreshed = [results["refresh"] for results in ranks]
    assert sum(asked for _, asked in refreshed) == 3 * 12  # each entry by one rank
    for state, _ in refreshed:
        assert_same(state, refreshed[0][0])


@on_ranks
def test_ranks_refuse_a_second_derivative(ranks: list[Any]) -> None:
    for results in ranks:
        assert "once_differentiable" in results["second derivative"]


CHECKPOINTED = ("emc2-drop", "emc2-cache", "emc2-keyed", "sogclr-γ = 0.9", "sogclr-keyed", "negative-cache")
IN_PLACE = ("emc2-drop", "sogclr-γ = 0.9", "negative-cache")  # a new loss has tables as large as the saved one's


def _checkpoint(rank: int, folder: str) -> None:
    """Train, and save a checkpoint that all ranks write, beside a file of one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    for name in CHECKPOINTED:
        loss_fn, saved = MAKERS[name](), Path(folder, name)
        for step in range(3):
            z1, z2, index = (part.split(SIZES[4])[rank] for part in batch(step, sum(SIZES[4])))
            loss_fn(z1, z2, index, encode=table().__getitem__)
        dcp.save(loss_fn.sharded_state_dict(), checkpoint_id=saved)
        if rank == 0:
            torch.save(loss_fn.state_dict(), f"{saved}.pt")
    dist.destroy_process_group()


def _restore(rank: int, folder: str) -> None:
    """Read it on ranks that are fewer, straight into the tables."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous2", rank=rank, world_size=3)
    for name in IN_PLACE:
        loss_fn, saved = MAKERS[name](), Path(folder, name)
        state = loss_fn.state_dict()
        dcp.load(state, checkpoint_id=saved)
        loss_fn.load_state_dict(state)
        assert_same(loss_fn.state_dict(), torch.load(f"{saved}.pt", weights_only=True))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_four_ranks_write_a_checkpoint_that_three_and_one_read(tmp_path: Path) -> None:
    spawn(_checkpoint, (str(tmp_path),), nprocs=4)  # type: ignore[no-untyped-call]
    spawn(_restore, (str(tmp_path),), nprocs=3)  # type: ignore[no-untyped-call]
    for name in CHECKPOINTED:
        want = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        saved = dcp.FileSystemReader(tmp_path / name).read_metadata().state_dict_metadata.values()
        assert {len(table.chunks) for table in saved if hasattr(table, "chunks")} == {4}, "tables are not split"
        if name in IN_PLACE:
            loss_fn = MAKERS[name]()
            state = loss_fn.state_dict()
            dcp.load(state, checkpoint_id=tmp_path / name)
            loss_fn.load_state_dict(state)
            assert_same(loss_fn.state_dict(), want)
        dcp_to_torch_save(tmp_path / name, tmp_path / "one.pt")
        loss_fn = MAKERS[name]()
        loss_fn.load_state_dict(torch.load(tmp_path / "one.pt", weights_only=True, mmap=True))
        assert_same(loss_fn.state_dict(), want)


@each_loss
def test_a_second_derivative_is_refused(name: str) -> None:
    z1, z2, index = batch(0, 6)
    z1.requires_grad_()
    loss = MAKERS[name]()(z1, z2, index, encode=table().__getitem__)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, z1, create_graph=True)
