"""Seeds against the published numbers of splitmix64."""

import pytest

from torch_emc2.seeds import mix_seed

GOLDEN = 0x9E3779B97F4A7C15  # what splitmix64 adds to its state for every number


def test_one_word_gives_the_numbers_of_splitmix64() -> None:
    assert mix_seed(0) == 0xE220A8397B1DCDAF
    assert [mix_seed(1234567 + step * GOLDEN) for step in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_words_are_chained_in_their_order() -> None:
    assert mix_seed(1, 2) == mix_seed(mix_seed(1) ^ 2)
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(5) != mix_seed(5, 0)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_bit_of_a_word_changes_half_of_the_low_bits(place: int) -> None:
    """The low 32 are those that torch takes; a negative word is its two's complement."""
    words = [7, 0, 3]
    flips = []
    for bit in range(64):
        other = [word ^ (1 << bit) if i == place else word for i, word in enumerate(words)]
        flips.append(((mix_seed(*other) ^ mix_seed(*words)) & 0xFFFFFFFF).bit_count())
    assert min(flips) >= 4
    assert sum(flips) / 64 == pytest.approx(16, abs=1.5)  # four standard deviations
    negative = [word - 2**64 if i == place else word for i, word in enumerate(words)]
    assert mix_seed(*negative) == mix_seed(*words)
