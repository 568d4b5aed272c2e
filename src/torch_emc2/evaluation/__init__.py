"""How good an encoder's features are: linear probes and nearest neighbours under one fixed protocol."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from torch_emc2.evaluation.features import extract_features, raw_pixels
from torch_emc2.evaluation.knn import knn_accuracy, nearest_neighbours
from torch_emc2.evaluation.probe import ProbeResult, linear_probe, sgd_probe

__all__ = [
    "ProbeResult",
    "evaluate",
    "extract_features",
    "knn_accuracy",
    "linear_probe",
    "nearest_neighbours",
    "raw_pixels",
    "sgd_probe",
]


def evaluate(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    ks: Sequence[int] = (1, 10, 20, 200),
    probe: Literal["logistic", "sgd"] = "logistic",
    seed: int = 0,
) -> dict[str, float]:
    """Run every evaluation on features of a training and a test part.

    Args:
        train_x: (n, d).
        train_y: (n,), class numbers.
        test_x: (q, d).
        test_y: (q,), class numbers.
        ks: neighbourhood sizes; those above n are left out.
        probe: logistic regression (`linear_probe`), or the paper's protocol (`sgd_probe`).
        seed: of the probe.

    Returns:
        Test accuracies in [0, 1]: "probe", and "knn1_euclidean", "knn1_cosine" for every k.

    Raises:
        ValueError: as the evaluations themselves.
    """
    part = (train_x, train_y, test_x, test_y)
    accuracy = sgd_probe(*part, seed=seed) if probe == "sgd" else linear_probe(*part, seed=seed).accuracy
    metrics = {"probe": accuracy}
    possible = [k for k in ks if k <= len(train_x)]
    for metric in ("euclidean", "cosine"):
        accuracies = knn_accuracy(*part, possible, metric)
        metrics |= {f"knn{k}_{metric}": accuracy for k, accuracy in accuracies.items()}
    return metrics
