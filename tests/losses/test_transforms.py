"""A loss inside of what traces, copies or compiles: it runs between compiled graphs, and refuses the rest."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_contract import MAKERS, assert_same, batch, each_loss, table
from torch import Tensor, nn

from torch_emc2.losses import Encode

COMPILED = ("infonce", "dcl", "sogclr-γ = 0.9", "sogclr-keyed", "negative-cache")
COMPILED += ("emc2-cache", "emc2-encode", "emc2-isir")


def compile_steps() -> None:
    """Compile steps that hold a loss; to be called in a process that has done nothing else."""
    from torch._dynamo.utils import counters

    for name in COMPILED:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        encoder, ran = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), []
        twin, encode = copy.deepcopy(encoder), table().float().__getitem__
        loss_fn, plain = MAKERS[name](), MAKERS[name]()

        def count(graph: torch.fx.GraphModule, inputs: list[Tensor], ran: list[int] = ran) -> object:
            return lambda *args: ran.append(0) or graph.forward(*args)

        def step(
            encoder: nn.Module, loss_fn: nn.Module, z1: Tensor, z2: Tensor, index: Tensor, encode: Encode
        ) -> Tensor:
            loss: Tensor = loss_fn(encoder(z1), encoder(z2), index, encode=encode)
            return loss

        compiled = torch.compile(step, backend=count)
        for number in range(8):
            z1, z2, index = batch(number, 6)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for run, *what in ((compiled, encoder, loss_fn), (step, twin, plain)):
                    run(*what, z1.float(), z2.float(), index, encode=encode).backward()
            assert_same([p.grad for p in encoder.parameters()], [p.grad for p in twin.parameters()])
            assert_same(loss_fn.state_dict(), plain.state_dict())
            if number == 1:
                frames = counters["frames"].copy()
        assert ran == [0] * 8, f"{name}: {len(ran)} compiled pieces ran in 8 steps"
        assert counters["frames"] == frames, f"{name} compiles after the second step"
        assert sum(counters["graph_break"].values()) == 1, counters["graph_break"]
    infonce = MAKERS["infonce"]()
    whole = torch.compile(lambda z1, z2: infonce(z1, z2), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a loss and its memory are no part of a graph: compile without fullgraph=True"):
        whole(*batch(0, 6)[:2])


def test_a_compiled_step_breaks_once_and_is_right() -> None:
    """In a process of its own: the loss's first call, which compiles the walk, is inside of the compiled step."""
    code, folder = "import test_transforms; test_transforms.compile_steps()", Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@each_loss
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "replica"])
def test_what_would_change_a_trace_or_a_copy_is_refused(name: str, transform: str) -> None:
    loss_fn, (z1, z2, index), encode = MAKERS[name](), batch(0, 6), table().__getitem__
    loss_fn(z1, z2, index, encode=encode)
    before = copy.deepcopy((loss_fn.state_dict(), loss_fn.last))

    def call(z: Tensor) -> Tensor:
        loss: Tensor = loss_fn(z, z2, index, encode=encode)
        return loss

    with pytest.raises(RuntimeError, match=r"no state has changed") as error:  # noqa: PT012
        match transform:
            case "grad":
                torch.func.grad(call)(z1)
            case "vmap":
                torch.func.vmap(call)(z1[None])
            case "jvp":
                torch.func.jvp(call, (z1,), (z1,))
            case "replica":  # as nn.DataParallel makes them
                loss_fn._replicate_for_data_parallel()(z1, z2, index, encode=encode)
    assert ("nn.DataParallel" if transform == "replica" else "torch.func") in str(error.value)
    assert_same((loss_fn.state_dict(), loss_fn.last), before)


@each_loss
def test_a_functional_call_is_a_call(name: str) -> None:
    called, plain, call, encode = MAKERS[name](), MAKERS[name](), batch(0, 6), {"encode": table().__getitem__}
    for _ in range(2):
        got = torch.func.functional_call(called, {}, call, encode)
        assert_same(got, plain(*call, **encode))
    assert_same(called.state_dict(), plain.state_dict())
