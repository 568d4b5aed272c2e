import pytest
import torch

from torch_emc2.evaluation import accuracies, knn_accuracy, linear_probe, sgd_probe


def part(counts, seed, shift=1.0):
    """Noise around a point a class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return shift * torch.eye(5)[y] + torch.randn(len(y), 5, generator=generator), y


def test_one_dict_of_the_single_evaluations():
    parts = *part([30, 20, 10], 0), *part([9, 9, 9], 1)
    measured, notes = accuracies(*parts, ks=(1, 5, 61), seed=3)
    assert measured == {
        "probe": linear_probe(*parts, seed=3).accuracy,
        **{f"knn{k}_euclidean": a for k, a in knn_accuracy(*parts, (1, 5)).items()},
        **{f"knn{k}_cosine": a for k, a in knn_accuracy(*parts, (1, 5), "cosine").items()},
    }
    assert notes == []
    assert accuracies(*parts, ks=(1,), probe="sgd", seed=3)[0]["probe"] == sgd_probe(*parts, seed=3)


def test_neighbours_do_not_hang_on_the_probe():
    parts = *part([12], 0), *part([4, 4], 1)
    measured, notes = accuracies(*parts, ks=(1,))
    assert measured == {"knn1_euclidean": 0.5, "knn1_cosine": 0.5}
    assert notes == ["no probe: all 12 training labels are 0; a probe needs two classes, or more"]


def test_a_strength_that_was_not_chosen_is_said():
    parts = *part([1, 1, 1], 0), *part([3, 3, 3], 1)
    measured, notes = accuracies(*parts, ks=(1, 10))
    assert set(measured) == {"probe", "knn1_euclidean", "knn1_cosine"}
    assert notes == ["no class has a second training image to choose the probe's L2 by: it is 0.01"]


def test_bad_input_is_refused():
    train_x, train_y, test_x, test_y = *part([12, 3], 0), *part([4, 4], 1)
    with pytest.raises(ValueError, match="test features are not finite in row 0"):
        accuracies(train_x, train_y, test_x / 0, test_y)
    with pytest.raises(ValueError, match="minimum -1"):
        accuracies(train_x, train_y - 1, test_x, test_y)
