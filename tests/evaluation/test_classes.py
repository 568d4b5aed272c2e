import pytest
import torch

from torch_emc2.evaluation import classifiable

CLASSES = ["ant", "bee\nhive", "cat", "dog"]


def check(train, test):
    rows, notes = classifiable(
        None if train is None else torch.tensor(train), None if test is None else torch.tensor(test), CLASSES
    )
    assert not any("\n" in note for note in notes)
    return rows.tolist(), notes


def test_all_is_well():
    assert check([0, 1, 2, 3, 3], [3, 2, 1, 0]) == ([0, 1, 2, 3], [])


def test_what_cannot_be_tested_is_named_and_left_out():
    assert check([0, 1, 2], [3, 2, 3]) == (
        [1],
        [
            "classes without training images: 1 ('dog'); test images left out: 2",
            r"classes without test images, not tested: 2 ('ant', 'bee\nhive')",
        ],
    )
    assert check([0, 1], [2, 3]) == (
        [],
        ["no accuracies: the test images' classes have no training images: 'cat', 'dog'"],
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_any_integers(dtype):
    train, test = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 0]).to(dtype)
    rows, notes = classifiable(train, test, CLASSES)
    assert (rows.tolist(), notes) == ([0, 1], [])


def test_of_many_names_the_first_are_said():
    classes = [f"k{i}" for i in range(99)]
    (note,) = classifiable(torch.arange(99), torch.zeros(1, dtype=torch.int64), classes)[1]
    assert note.startswith("classes without test images, not tested: 98 ('k1', 'k2', ")
    assert note.endswith("'k10', …)")


@pytest.mark.parametrize(
    ("train", "test", "note"),
    [
        (None, None, "no accuracies: the training images have no labels"),
        (None, [0], "no accuracies: the training images have no labels"),
        ([0], None, "no accuracies: the test images have no labels"),
        ([2, 2], [2, 1], "no accuracies: all training images are of one class, 'cat'"),
    ],
)
def test_nothing_to_classify(train, test, note):
    assert check(train, test) == ([], [note])
