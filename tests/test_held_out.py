import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_emc2.held_out import held_out_fifth

counts = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def labelled(counts, seed):
    """So many images of each class, in some order, under numbers with gaps."""
    labels = torch.repeat_interleave(torch.arange(len(counts)) * 7 + 3, torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


@settings(deadline=None)
@given(counts, st.integers(0, 99))
def test_every_class_keeps_an_image_and_gives_a_fifth(counts, seed):
    labels = labelled(counts, seed)
    chosen = held_out_fifth(labels, seed)
    assert chosen.shape == labels.shape
    for place, count in enumerate(counts):
        held = int((labels[chosen] == 7 * place + 3).sum())
        assert held == 0 if count == 1 else abs(held - count / 5) < 1
        assert held < count
    several = sum(count for count in counts if count > 1)
    assert chosen.sum() == -(-several // 5)


@settings(deadline=None)
@given(counts, st.integers(0, 99), st.sampled_from([torch.uint8, torch.int16, torch.int32]))
def test_the_choice_depends_on_labels_and_seed_alone(counts, seed, dtype):
    labels = labelled([min(count, 6) for count in counts[:30]], seed)
    torch.rand(3)  # the global generator is not used
    assert torch.equal(held_out_fifth(labels, seed), held_out_fifth(labels.to(dtype), seed))


def test_the_choice_is_random():
    labels = torch.zeros(1000, dtype=torch.int64)
    first, second = held_out_fifth(labels), held_out_fifth(labels, seed=1)
    assert abs(int((first & second).sum()) - 40) < 20  # independent fifths share a twenty-fifth
    thirds = first.nonzero()[:, 0] // 334
    assert all(abs(int((thirds == i).sum()) - 67) < 20 for i in range(3))
