import torch

from torch_emc2.evaluation import Evaluation, Features, accuracies, compare, label_free_numbers, to_text

NAMES = ["ant", "bee", "cat"]


def features(seed, train=12, test=6, views=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = (train, 3), (test, 3), (views, 2, 3)
    return Features(*(torch.randn(shape, generator=generator) for shape in shapes))


def test_every_encoder_has_all_numbers():
    encoders = {"trained": features(0), "untrained": features(1)}
    train_y, test_y = torch.arange(12) % 3, torch.arange(6) % 3
    evaluation = compare("x", encoders, train_y, test_y, NAMES, seed=5)
    assert (evaluation.train_images, evaluation.test_images, evaluation.viewed_images) == (12, 6, 4)
    assert evaluation.notes == []
    for name, own in encoders.items():
        expected, _ = accuracies(own.train, train_y, own.test, test_y, seed=5)
        assert evaluation.numbers[name] == expected | label_free_numbers(own.test[:4], own.views)


def test_images_of_unknown_classes_do_not_count():
    own, train_y, test_y = features(0), torch.arange(12) % 2, torch.tensor([2, 0, 1, 2, 0, 1])
    evaluation = compare("x", {"trained": own}, train_y, test_y, NAMES)
    known = [1, 2, 4, 5]
    expected, _ = accuracies(own.train, train_y, own.test[known], test_y[known])
    assert evaluation.numbers["trained"] == expected | label_free_numbers(own.test[:4], own.views)
    assert evaluation.notes == ["classes without training images: 1 ('cat'); test images left out: 2"]


def test_without_labels_there_are_the_other_numbers():
    own = features(0)
    evaluation = compare("x", {"trained": own}, None, None, [])
    assert evaluation.numbers == {"trained": label_free_numbers(own.test[:4], own.views)}
    assert evaluation.notes == ["no accuracies: the training images have no labels"]
    one = compare("x", {"trained": features(0, test=1, views=1)}, None, None, [])
    assert one.numbers == {"trained": {}}
    assert one.notes[1] == "one test image: what needs no labels compares two, at least"


def test_text_has_a_row_a_number_and_a_column_an_encoder():
    numbers = {"trained": {"probe": 0.91234, "uniformity": -1.5}, "raw pixels": {"uniformity": -0.25, "retrieval": 0.5}}
    text = to_text(Evaluation("x", 12, 6, 4, numbers, ["one thing", "another"]))
    assert text.splitlines() == [
        "images: 12 training, 6 test, 4 of them for what needs no labels",
        "                         trained    raw pixels",
        "probe                    91.23 %             -",
        "uniformity                -1.500        -0.250",
        "retrieval                      -       50.00 %",
        "Note: one thing",
        "Note: another",
    ]
