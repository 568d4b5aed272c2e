"""Slots of keys, and a table behind them, against a dictionary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_emc2.memory.slots import UNKNOWN, Slots
from torch_emc2.memory.tables import SampleTable

KEYS = [-(2**63), -7, 0, 1, 5, 10**15, 2**63 - 1]
some_keys = st.sets(st.sampled_from(KEYS), max_size=4)


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(some_keys, some_keys), max_size=8))
def test_equals_a_dictionary(steps: list[tuple[set[int], set[int]]]) -> None:
    slots, table, known, most = Slots(None), SampleTable(None, (), torch.int64, -3), {}, 0
    for number, (written, forgotten) in enumerate(steps):
        ids = torch.tensor(sorted(written), dtype=torch.int64)
        at = slots.place(ids)
        slots.keep(ids, at)
        table.write(at, ids % 1000 + number)
        known |= {key: key % 1000 + number for key in sorted(written)}
        most = max(most, len(known))
        table.erase(slots.forget(torch.tensor(sorted(forgotten), dtype=torch.int64)))
        known = {key: value for key, value in known.items() if key not in forgotten}

        everything = torch.tensor(KEYS)
        at = slots.find(everything)
        assert table.read(at).tolist() == [known.get(key, -3) for key in KEYS]
        assert [key for key, slot in zip(KEYS, at.tolist(), strict=True) if slot == UNKNOWN] == [
            key for key in KEYS if key not in known
        ]
        assert (at < most).all(), "the slots of forgotten keys are used again"
        keys, at = slots.keys()
        assert dict(zip(keys.tolist(), table.state(at).tolist(), strict=True)) == known
        loaded = Slots(None)
        loaded.load(keys)
        drawn, again = (each.drawn(60, torch.Generator().manual_seed(number)).tolist() for each in (slots, loaded))
        assert drawn == again, "a memory that is saved and loaded draws what would have come next"
        assert set(drawn) <= set(known or [UNKNOWN])
        assert len(drawn) == 60
        assert list(loaded._slots.items()) == [(key, slot) for slot, key in enumerate(known)]


def test_a_place_is_nobodys_until_it_is_kept() -> None:
    slots = Slots(None)
    ids = torch.tensor([8, -8, 8])
    assert slots.place(ids).tolist() == [0, 1, 0]
    assert slots.find(ids).tolist() == [UNKNOWN] * 3
    slots.keep(ids, slots.place(ids))
    assert slots.find(ids).tolist() == [0, 1, 0]


@pytest.mark.parametrize("fixed", [True, False])
def test_draws_are_uniform(fixed: bool) -> None:
    slots, size, count = Slots(5 if fixed else None), 5, 20_000
    ids = torch.arange(size) if fixed else torch.tensor(KEYS[:size])
    slots.keep(ids, slots.place(ids))
    drawn = slots.drawn(count, torch.Generator().manual_seed(0))
    share = (drawn[:, None] == ids).float().mean(0)
    assert drawn.shape == (count,)
    assert (share - 1 / size).abs().max() < 5 * (0.2 * 0.8 / count) ** 0.5


def test_what_was_freed_before_a_state_is_loaded_is_free_no_more() -> None:
    slots, old, kept, new = Slots(None), torch.arange(10, 16), torch.tensor([7, 8, 9]), torch.tensor([1, 2, 3, 4])
    slots.keep(old, slots.place(old))
    slots.forget(old[:4])
    slots.load(kept)
    slots.keep(new, slots.place(new))
    assert slots.find(torch.cat([kept, new])).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert slots.find(old).tolist() == [UNKNOWN] * 6


def test_storage_doubles() -> None:
    table, moves = SampleTable(None, (), torch.float32, 0.0), 0
    for slot in range(1000):
        before = table.data.data_ptr()
        table.write(torch.tensor([slot]), torch.ones(1))
        moves += before != table.data.data_ptr()
    assert moves <= 11
    assert len(table.data) <= 2000


def test_storage_is_twice_what_it_was_or_what_is_needed() -> None:
    table, sizes = SampleTable(None, (), torch.float32, 0.0), []
    for slot in (0, 1, 2, 3, 4, 7, 8, 15, 100, 99, 101):
        table.write(torch.tensor([slot]), torch.ones(1))
        sizes.append(len(table.data))
    assert sizes == [1, 2, 4, 4, 8, 8, 16, 16, 101, 101, 202]


@pytest.mark.parametrize("num_samples", [None, 5])
def test_saved_keys_of_another_kind_are_refused(num_samples: int | None) -> None:
    keys = None if num_samples is None else torch.tensor([3])
    with pytest.raises(ValueError, match="build the loss as the saved one was"):
        Slots(num_samples).check(keys)


def test_a_saved_key_has_one_slot() -> None:
    with pytest.raises(ValueError, match="keys are not int64, all different, one an entry: the state is damaged"):
        Slots(None).check(torch.tensor([4, 7, 4]), torch.zeros(3))
