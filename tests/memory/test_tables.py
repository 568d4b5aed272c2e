"""The table against a dictionary, and where its memory lies."""

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_emc2.memory.chains import ChainTable
from torch_emc2.memory.slots import Slots
from torch_emc2.memory.tables import SampleTable


@settings(max_examples=60, deadline=None)
@given(writes=st.lists(st.sets(st.integers(0, 40), min_size=1, max_size=6), max_size=8), grows=st.booleans())
def test_reads_what_was_written(writes: list[set[int]], grows: bool) -> None:
    table, known = SampleTable(None if grows else 41, (2,), torch.float32, -7.0), {}
    for number, ids in enumerate(writes):
        values = torch.full((len(ids), 2), float(number)) + torch.arange(len(ids))[:, None]
        table.write(torch.tensor(sorted(ids)), values)
        known |= dict(zip(sorted(ids), values.tolist(), strict=True))
    assert table.read(torch.arange(41)).tolist() == [known.get(i, [-7.0, -7.0]) for i in range(41)]


def test_a_read_is_a_copy() -> None:
    table = SampleTable(3, (), torch.float32, 0.0)
    table.read(torch.arange(3)).add_(1)
    assert table.data.tolist() == [0, 0, 0]


def _write(data: Tensor) -> None:
    data[1] = 5


def test_shared_memory_stays_shared_over_writes_and_loads() -> None:
    table = SampleTable(3, (), torch.int32, -1)
    shared = table.share_memory()
    table.write(torch.tensor([0]), torch.tensor([4]))
    table.load(torch.tensor([4, -1, 9], dtype=torch.int32))
    process = torch.multiprocessing.get_context("fork").Process(target=_write, args=(shared,))
    process.start()
    process.join()
    assert table.read(torch.arange(3)).tolist() == [4, 5, 9]
    with pytest.raises(ValueError, match="grows cannot be shared"):
        SampleTable(None, (), torch.int32, -1).share_memory()


def test_ids_are_narrow_until_they_must_not_be() -> None:
    assert ChainTable(10, 1, num_negatives=10).ids.data.dtype == torch.int32
    assert ChainTable(10, 1, num_negatives=None).ids.data.dtype == torch.int64  # of the other side
    assert ChainTable(None, 1, num_negatives=10).ids.data.dtype == torch.int32
    table = ChainTable(10, 1, num_negatives=10)
    assert table.ids.data.element_size() + table.similarities.data.element_size() == 8


def test_ids_beyond_int32_are_wide() -> None:
    with torch.device("meta"):  # no memory
        sizes = 2**31 - 1, 2**31 + 1  # the largest id is one less
        tables = {size: ChainTable(3, 1, num_negatives=size).ids.data for size in sizes}
    assert {size: data.dtype for size, data in tables.items()} == {2**31 - 1: torch.int32, 2**31 + 1: torch.int64}
    chains, carried = ChainTable(None, 1, num_negatives=None), torch.tensor([[2**31], [-(2**62)]])
    chains.write(torch.tensor([0, 1]), carried, torch.zeros(2, 1))
    assert torch.equal(chains.ids.read(torch.tensor([0, 1])), carried)


def test_draws_do_not_depend_on_the_default_device() -> None:
    want = Slots(9).drawn(4, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        assert torch.equal(Slots(9).drawn(4, torch.Generator(device="cpu").manual_seed(0)), want)


def test_what_was_never_written_may_be_erased() -> None:
    table = SampleTable(None, (), torch.int32, -1)
    table.write(torch.tensor([0, 1]), torch.tensor([3, 4]))
    table.erase(torch.tensor([7, 1]))
    assert table.read(torch.tensor([0, 1, 7])).tolist() == [3, -1, -1]


def test_a_read_leaves_the_table_as_it_is() -> None:
    table = SampleTable(None, (2,), torch.int32, -1)
    assert table.read(torch.tensor([7, 10**15])).tolist() == [[-1, -1], [-1, -1]]
    assert len(table.data) == 0
    table.write(torch.tensor([1]), torch.tensor([[3, 4]]))
    assert table.read(torch.tensor([10**15, 1])).tolist() == [[-1, -1], [3, 4]]
    assert len(table.data) == 2


@pytest.mark.parametrize("num_samples", [None, 4])
def test_what_inference_mode_makes_is_written_in_training(num_samples: int | None) -> None:
    with torch.inference_mode():
        table = SampleTable(num_samples, (), torch.float32, 0.0)
        table.write(torch.tensor([1]), torch.tensor([5.0]))  # grows
    table.write(torch.tensor([0]), torch.tensor([4.0]))
    with torch.inference_mode():
        loaded = SampleTable(num_samples, (), torch.float32, 0.0)
        loaded.load(table.data)
    loaded.write(torch.tensor([0]), torch.tensor([3.0]))
    assert loaded.data[:2].tolist() == [3, 5]


@pytest.mark.parametrize("num_samples", [None, 3])
def test_loading_copies(num_samples: int | None) -> None:
    table, saved = SampleTable(num_samples, (), torch.int32, -1), torch.tensor([1, 2, 3], dtype=torch.int32)
    table.load(saved)
    table.write(torch.tensor([0]), torch.tensor([9]))
    assert saved.tolist() == [1, 2, 3]
    saved[1] = 7
    assert table.data.tolist() == [9, 2, 3]


def test_where_there_is_no_memory_nothing_changes() -> None:
    chains = ChainTable(None, 2, num_negatives=None)
    chains.write(torch.tensor([1]), torch.tensor([[3, 4]]), torch.zeros(1, 2))
    before = {name: data.clone() for name, data in chains.state().items()}
    with pytest.raises(RuntimeError, match="memory"):
        chains.write(torch.tensor([0, 10**15]), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2))
    torch.testing.assert_close(chains.state(), before, rtol=0, atol=0)


def test_only_a_shared_table_stays_where_it_is() -> None:
    ids, tables = torch.zeros(1, dtype=torch.int64, device="meta"), [SampleTable(3, (), torch.int32, -1) for _ in "ab"]
    tables[1].share_memory()
    for table in tables:
        table.make_room(ids)
    assert [table.data.device.type for table in tables] == ["meta", "cpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_follows_from_gpu_to_cpu() -> None:
    table = SampleTable(3, (), torch.int32, -1)
    for device in ("cuda", "cpu"):
        table.write(torch.tensor([1], device=device), torch.tensor([2], device=device))
        assert table.data.device.type == device
    shared = table.share_memory()
    table.write(torch.tensor([0], device="cuda"), torch.tensor([7], device="cuda"))
    assert shared.tolist() == [7, 2, -1]
