import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_emc2.integrations.text_ids import text_ids

TEXTS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), min_size=1, max_size=6)
WORD = (1 << 64) - 1


def splitmix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


def by_hand(text: list[int]) -> int:
    """In whole numbers without a sign, token by token."""
    total = sum(splitmix(splitmix(token) + place) for place, token in enumerate(text, 1))
    word = splitmix((total + len(text)) & WORD)
    return word - (1 << 64) if word >> 63 else word


@settings(deadline=None)
@given(TEXTS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**31 - 1))
def test_ids_are_those_by_hand_whatever_is_padded(texts: list[list[int]], before: int, after: int, pad: int) -> None:
    width = max(map(len, texts)) + before + after
    tokens = torch.full((len(texts), width), pad)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(width - after - len(text), width - after) if row % 2 else slice(before, before + len(text))
        tokens[row, place], mask[row, place] = torch.tensor(text, dtype=torch.int64), 1
    assert text_ids(tokens, mask).tolist() == [by_hand(text) for text in texts]
    assert text_ids(tokens, mask.bool()).tolist() == text_ids(tokens.int(), mask.float()).tolist()


def test_order_and_length_count() -> None:
    texts = torch.tensor([[1, 2, 0], [2, 1, 0], [1, 2, 2], [0, 1, 2]])
    masks = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]])
    first, *others = text_ids(texts, masks).tolist()
    assert [other == first for other in others] == [False, False, True]
    assert len(set(text_ids(texts).tolist())) == 4  # without a mask all counts


def test_what_marks_an_empty_chain_is_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_emc2.integrations.text_ids._mixed", lambda words: torch.full_like(words, -1))
    assert text_ids(torch.ones(2, 3, dtype=torch.int64)).tolist() == [0, 0]
