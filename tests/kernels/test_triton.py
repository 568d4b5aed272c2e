"""The moves for a GPU against those for the CPU, with the same draws; without a GPU in Triton's interpreter."""

import importlib
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.test_every_kernel import visits
from kernels.test_numba import batch, check_shuffles
from torch_emc2.kernels import Isir, Kernel, Metropolis, Visit
from torch_emc2.kernels.counted import CountedDraws, compiled_kernels
from torch_emc2.ranks import Ranks

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def triton_kernels() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("torch_emc2.kernels._triton")


def check(kernel: Kernel, visit: Visit, seed: int, triton_kernels: ModuleType) -> None:
    rows, dtype = len(visit.logits), visit.logits.dtype
    there = Visit(*(None if each is None else each.to(DEVICE) for each in vars(visit).values()))
    numba_kernels = compiled_kernels("cpu")
    assert numba_kernels is not None
    want = kernel.move(visit, CountedDraws(numba_kernels, seed, 0, rows, Ranks((rows,), 0, CPU), dtype))
    got = kernel.move(there, CountedDraws(triton_kernels, seed, 0, rows, Ranks((rows,), 0, DEVICE), dtype))
    assert torch.equal(got.state.cpu(), want.state)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for name in ("weights", "carried_weights", "acceptance"):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(want, name), **close)


@pytest.mark.parametrize("kernel", [Metropolis(), Metropolis(0.3), Isir()])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(visit=visits(), seed=st.integers(0, 2**63))
def test_moves_are_those_of_the_cpu(kernel: Kernel, visit: Visit, seed: int, triton_kernels: ModuleType) -> None:
    check(kernel, visit, seed, triton_kernels)


@pytest.mark.parametrize("kernel", [Metropolis(), Isir()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "n", "chains"), [(2, 2, 1), (35, 33, 3)])
def test_whole_batches(
    rows: int, n: int, chains: int, dtype: torch.dtype, kernel: Kernel, triton_kernels: ModuleType
) -> None:
    for column_first in (False, True):
        check(kernel, batch(rows, n, chains, dtype, column_first=column_first), n, triton_kernels)


def test_parts_and_ranks_draw_what_they_draw_on_the_cpu(triton_kernels: ModuleType) -> None:
    for sizes, rank, first, rows in [((7,), 0, 4, 6), ((3, 4), 1, 0, 8)]:
        drawn: list[Any] = []
        for kernels, device in ((compiled_kernels("cpu"), CPU), (triton_kernels, DEVICE)):
            assert kernels is not None
            draws = CountedDraws(kernels, 2**63 + 5, first, rows, Ranks(sizes, rank, device), torch.float64)
            drawn.append([draws.exponential(3, 60).cpu() for _ in range(2)])
        torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=2e-6)


def test_orders_views_and_coins_are_fair(triton_kernels: ModuleType) -> None:
    check_shuffles(triton_kernels, DEVICE, times=300)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torch_emc2.kernels import _triton

KINDS = {
    "*kind": "logits weights carried_score carried_steps counted accepted_steps all_steps carried_weights acceptance",
    "*i64": "sets place coins keep_in carried_ids column_ids private_ids state",
    "*fp32": "out",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
SIZES = {
    "_draw": {"BLOCK": _triton._BLOCK},
    "_shuffle": {"BLOCK": _triton._BLOCK, "TILE": _triton._TILE},
    "_walk": {"CHAINS": 3, "BURN_IN": 0.5, "LANES": _triton._LANES, "TILE": _triton._TILE},
    "_divide": {"CHAINS": 3, "WIDTH": 4, "LANES": _triton._LANES, "TILE": _triton._TILE},
    "_resample": {"SETS": 2, "CHAINS": 3, "WIDTH": 4, "LANES": _triton._FEW_LANES, "TILE": _triton._LONG_TILE},
}
for name, sizes in SIZES.items():
    function = getattr(_triton, name)
    varied = {each.name for each in function.params if each.do_not_specialize}
    for kind, ones in (("fp32", False), ("fp64", True)):  # a launch makes constants of numbers that are 1
        signature = {each: KIND_OF.get(each, "i32").replace("kind", kind) for each in function.arg_names}
        constants = sizes | {each: 1 for each, of in signature.items() if ones and of == "i32" and each not in varied}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            fn=function,
            signature=signature,
            constexprs={(function.arg_names.index(each),): value for each, value in constants.items()},
        )
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"], name
"""


def test_all_compiles_for_a_gpu(triton_kernels: ModuleType) -> None:
    """Also where there is none; the interpreter bears what the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)
