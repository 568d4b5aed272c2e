"""The table against a dictionary, and where its memory lies."""

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_emc2.chains import ChainTable
from torch_emc2.tables import SampleTable


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
    assert ChainTable(10, 1).ids.data.dtype == torch.int32
    assert ChainTable(10, 1).ids.data.element_size() + ChainTable(10, 1).scores.data.element_size() == 8
