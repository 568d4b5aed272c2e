"""Samples and their indices, as a loader gives them."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from torch_emc2 import IndexedDataset


class AtOnce(Dataset):
    """One that reads a batch at once."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers, self.calls = numbers, 0

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.numbers[index]

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        self.calls += 1
        return list(self.numbers[indices])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_gives_each_sample_with_its_own_index(num_workers: int) -> None:
    numbers = torch.arange(10) ** 2
    dataset = IndexedDataset(TensorDataset(numbers, -numbers))
    assert len(dataset) == 10
    assert dataset[3] == ((torch.tensor(9), torch.tensor(-9)), 3)
    assert dataset[-1][1] == 9  # -1 would be no sample's id
    with pytest.raises(IndexError):
        dataset[10]
    met = []
    for (first, second), index in DataLoader(dataset, batch_size=4, shuffle=True, num_workers=num_workers):
        assert index.dtype == torch.int64
        assert torch.equal(first, numbers[index])
        assert torch.equal(second, -numbers[index])
        met += index.tolist()
    assert sorted(met) == list(range(10))


def test_of_a_subset_the_indices_are_those_of_what_is_wrapped() -> None:
    numbers = torch.arange(10) * 10
    inner, outer = Subset(IndexedDataset(numbers), [7, 2]), IndexedDataset(Subset(numbers, [7, 2]))
    assert [index for _, index in (inner[i] for i in range(2))] == [7, 2]
    assert [index for _, index in (outer[i] for i in range(2))] == [0, 1]


def test_a_dataset_that_reads_a_batch_at_once_still_does() -> None:
    dataset = AtOnce(torch.arange(8) * 2)
    for numbers, index in DataLoader(IndexedDataset(dataset), batch_size=4):
        assert torch.equal(numbers, 2 * index)
    assert dataset.calls == 2
