"""Every loss on a GPU: the numbers of the CPU, a process group of NCCL, and training in half precisions."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_contract import CASES, MAKERS, batch, table
from torch import Tensor

from torch_emc2 import EMC2Loss
from torch_emc2.config import Config
from torch_emc2.kernels.counted import compiled_kernels
from torch_emc2.losses import ContrastiveLoss, emc2, negative_cache
from torch_emc2.losses.draws import BatchDraws, Chances
from torch_emc2.losses.emc2 import Carry
from torch_emc2.training import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU = torch.device("cuda")


def steps(loss_fn: ContrastiveLoss, own_ids: bool, device: torch.device) -> list[list[Tensor]]:
    """Losses and gradients of five batches."""
    out = []
    for step in range(5):
        z1, z2, index = batch(step, 6, own_ids)
        inputs = [tensor.to(device).requires_grad_() for tensor in (z1, z2, table())]
        loss = loss_fn(inputs[0], inputs[1], index.to(device), encode=inputs[2].__getitem__)
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        out.append([tensor.detach().cpu() for tensor in (loss, *gradients)])
    return out


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw orders and coins on the CPU whatever the device: all else is drawn alike."""

    class Alike(BatchDraws):
        def chances(self, num_chains: int) -> Chances:
            contrast, there = self._contrast, torch.device("cpu")
            ranks = replace(contrast.ranks, device=there)
            self._contrast = replace(contrast, ranks=ranks, rows=contrast.rows.detach().cpu())
            self._device, self._kernels, here = there, compiled_kernels("cpu"), (self._device, self._kernels)
            drawn = super().chances(num_chains)
            self._contrast, (self._device, self._kernels) = contrast, here
            return Chances(*(each.to(self._device) for each in drawn))

    for module in (emc2, negative_cache):
        monkeypatch.setattr(module, "BatchDraws", Alike)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize(("name", "own_ids"), CASES)
def test_gpu_and_cpu_agree(name: str, own_ids: bool) -> None:
    on_cpu, on_gpu = MAKERS[name](), MAKERS[name]()
    want, got = steps(on_cpu, own_ids, torch.device("cpu")), steps(on_gpu, own_ids, GPU)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    states = [loss_fn.state_dict() for loss_fn in (on_gpu, on_cpu)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-6, atol=1e-6, check_device=False)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize(("name", "own_ids"), CASES)
def test_a_table_may_live_on_the_cpu_and_be_saved_for_it(name: str, own_ids: bool, tmp_path: Path) -> None:
    on_gpu, on_cpu = MAKERS[name](), MAKERS[name]()
    steps(on_gpu, own_ids, GPU)
    torch.save(on_gpu.state_dict(), tmp_path / "state.pt")
    on_cpu.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    torch.testing.assert_close(
        steps(on_cpu, own_ids, torch.device("cpu")), steps(on_gpu, own_ids, GPU), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("name", "own_ids"), CASES)
def test_one_rank_of_nccl_equals_no_group(name: str, own_ids: bool, tmp_path: Path) -> None:
    want = steps(MAKERS[name](), own_ids, GPU)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        got = steps(MAKERS[name](), own_ids, GPU)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # a GPU adds up in any order


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("num_chains", [1, 3, 17])
@pytest.mark.parametrize("kernel", ["metropolis", "isir"])
@pytest.mark.parametrize("views", [1, 2, 3, 33])
def test_gpu_and_cpu_agree_in_views_and_chains(views: int, kernel: str, num_chains: int) -> None:
    """One view: two towers."""
    settings: Any = {"kernel": kernel, "num_chains": num_chains, "towers": 2 if views == 1 else 1}
    generator, losses = torch.Generator().manual_seed(views), [EMC2Loss(50, **settings) for _ in range(2)]
    for _ in range(3):
        given = torch.randn(8, 2 if views == 1 else views, 4, dtype=torch.float64, generator=generator)
        index, got = torch.randperm(50, generator=generator)[:8], []
        for loss_fn, device in zip(losses, (GPU, torch.device("cpu")), strict=True):
            x = given.to(device).requires_grad_()
            loss = loss_fn(*(x.unbind(1) if views == 1 else (x,)), index=index)
            got.append([each.cpu() for each in (loss.detach(), *torch.autograd.grad(loss, x))])
        torch.testing.assert_close(*got, rtol=1e-8, atol=1e-8)
    for on_gpu, on_cpu in zip(losses[0].sides, losses[1].sides, strict=True):
        assert torch.equal(on_gpu.chains.ids.data.cpu(), on_cpu.chains.ids.data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_half_embeddings_give_the_loss_of_their_values(name: str, dtype: torch.dtype) -> None:
    z1, z2, index = (tensor.to(GPU) for tensor in batch(0, 6))
    z1, z2, rows = z1.to(dtype), z2.to(dtype), table().to(GPU, dtype)
    half = MAKERS[name]()(z1, z2, index, encode=rows.__getitem__)
    single = MAKERS[name]()(z1.float(), z2.float(), index, encode=rows.float().__getitem__)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("carry", "num_remembered"), [("cache", 0), ("cache", 8), ("defer", 0), ("drop", 0)])
@pytest.mark.parametrize("kernel", ["metropolis", "isir"])
def test_a_step_waits_once_and_once_more_for_ids_on_the_gpu(kernel: str, carry: Carry, num_remembered: int) -> None:
    loss_fn = EMC2Loss(50, kernel=kernel, carry=carry, num_remembered=num_remembered)
    for where, waits in ((GPU, 2), (torch.device("cpu"), 1)):
        for _ in range(2):  # the first moves tables
            z1, z2, index = torch.randn(8, 4, device=GPU), torch.randn(8, 4, device=GPU), torch.arange(8).to(where)
            z1.requires_grad_()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    loss_fn(z1, z2, index).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len([each for each in seen if "synchronizing" in str(each.message)]) == waits


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("loss", ["emc2", "infonce", "negative-cache"])
def test_training_in_half_precision_is_near_that_in_single(precision: Any, loss: Any, tiny: Config) -> None:
    losses = []
    for each in ("32-true", precision):
        config = replace(tiny, accelerator="gpu", precision=each, loss=loss, out=f"{tiny.out}-{each}")
        header, *rows = (line.split(",") for line in (train(config) / "metrics.csv").read_text().splitlines())
        losses.append([float(row[header.index("global_loss")]) for row in rows])
    assert losses[0][0] == pytest.approx(losses[1][0], abs=0.05)
    if loss != "negative-cache":  # whose draw of negatives turns on a rounding
        assert losses[0][-1] == pytest.approx(losses[1][-1], abs=0.2)


@pytest.mark.parametrize("name", [name for name, own_ids in CASES if not own_ids and not name.startswith("negative")])
def test_a_memory_that_is_moved_in_inference_mode_is_trained_on(name: str) -> None:
    tested, plain = MAKERS[name](), MAKERS[name]()
    with torch.inference_mode():
        inputs = [tensor.to(GPU) for tensor in batch(9, 6)]
        tested.eval()(*inputs, encode=table().to(GPU).__getitem__)
    torch.testing.assert_close(steps(tested.train(), False, GPU), steps(plain, False, GPU))
