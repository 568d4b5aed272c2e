"""How well a test part is classified from the features of a training part."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from torch_emc2.evaluation._checks import check_pair, class_numbers
from torch_emc2.evaluation.knn import knn_accuracy
from torch_emc2.evaluation.probe import linear_probe, sgd_probe

__all__ = ["accuracies"]


def accuracies(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    ks: Sequence[int] = (1, 10, 20, 200),
    probe: Literal["logistic", "sgd"] = "logistic",
    seed: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """Classify a test part by a probe and by nearest neighbours of a training part.

    Args:
        train_x: (n, d).
        train_y: (n,), class numbers.
        test_x: (q, d).
        test_y: (q,), class numbers.
        ks: neighbourhood sizes; those above n are left out.
        probe: logistic regression (`linear_probe`), or the paper's protocol (`sgd_probe`).
        seed: of the probe.

    Returns:
        Test accuracies in [0, 1]: "probe", and "knn1_euclidean", "knn1_cosine" for every k. And notes, a line each: on
        a probe that failed, which the others do not, or took a default.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, or negative labels.
    """
    check_pair(train_x, test_x)
    part = (train_x, class_numbers(train_x, train_y), test_x, class_numbers(test_x, test_y))
    measured: dict[str, float] = {}
    notes = []
    try:
        if probe == "sgd":
            measured["probe"] = sgd_probe(*part, seed=seed)
        else:
            result = linear_probe(*part, seed=seed)
            measured["probe"] = result.accuracy
            if not result.validation:
                notes.append(f"no class has a second training image to choose the probe's L2 by: it is {result.l2:g}")
    except ValueError as error:
        notes.append(f"no probe: {error}")
    possible = [k for k in ks if k <= len(train_x)]
    for metric in ("euclidean", "cosine"):
        by_k = knn_accuracy(*part, possible, metric)
        measured |= {f"knn{k}_{metric}": accuracy for k, accuracy in by_k.items()}
    return measured, notes
