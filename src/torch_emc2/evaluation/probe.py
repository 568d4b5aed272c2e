"""Linear probes: how well a linear classifier on frozen features does."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from torch_emc2.evaluation._checks import check_pair, class_numbers
from torch_emc2.held_out import held_out_fifth

__all__ = ["L2_DEFAULT", "L2_GRID", "ProbeResult", "linear_probe", "logistic_regression", "sgd_probe"]

L2_GRID = tuple(10.0**exponent for exponent in range(1, -7, -1))  # strong to weak: every fit starts at the one before
L2_DEFAULT = 1e-2  # where there is no image to choose by
_ROWS = 4096


@dataclass
class ProbeResult:
    """Outcome of `linear_probe`.

    Attributes:
        accuracy: on the test part, in [0, 1].
        l2: the strength chosen, or `L2_DEFAULT`.
        validation: accuracy on the held-out training rows for every strength tried; empty where no class has two rows,
            and none could be held out.
    """

    accuracy: float
    l2: float
    validation: dict[float, float]


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, seed: int = 0) -> ProbeResult:
    """Fit multinomial logistic regression on standardised features, its L2 strength chosen without the test part.

    It minimises `mean cross entropy + l2/2 |W|^2` by L-BFGS for the strengths in `L2_GRID`, on all but a fifth of the
    training rows (`held_out_fifth`); the best on that fifth (of equals the strongest) is fitted again on all of them.
    As the strength is relative to the mean, it means the same for both sizes. Beside the features it holds one copy of
    them, in float32.

    Args:
        train_x: (n, d).
        train_y: (n,), class numbers of any integer type, from 0 but not without gaps; at least two classes.
        test_x: (q, d).
        test_y: (q,), class numbers.
        seed: of the choice of the held-out rows.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, negative labels, or one class alone.
    """
    check_pair(train_x, test_x)
    train_y, test_y = class_numbers(train_x, train_y), class_numbers(test_x, test_y)
    if len(torch.unique(train_y)) < 2:
        raise ValueError(f"all {len(train_y)} training labels are {train_y[0]}; a probe needs two classes, or more")
    x, y = train_x.float().cpu().numpy(), train_y.cpu().numpy()
    held = held_out_fifth(train_y.cpu(), seed).numpy()
    model = logistic_regression()
    validation = _scores(model, L2_GRID, x[~held], y[~held], x[held], y[held]) if held.any() else {}
    best = max(validation, key=lambda l2: validation[l2], default=L2_DEFAULT)
    test = test_x.float().cpu().numpy().copy(), test_y.cpu().numpy()
    return ProbeResult(_scores(model, [best], x.copy(), y, *test)[best], best, validation)


def _scores(
    model: LogisticRegression,
    strengths: Sequence[float],
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    other_x: NDArray[np.float32],
    other_y: NDArray[np.int64],
) -> dict[float, float]:
    """Fit with each strength in turn, and return the accuracies on the other rows; the features are overwritten."""
    scaler = StandardScaler(copy=False)
    for first in range(0, len(x), _ROWS):  # at once, it takes twice the features' memory
        scaler.partial_fit(x[first : first + _ROWS])
    x, other_x = scaler.transform(x), scaler.transform(other_x)
    with warnings.catch_warnings():  # of few rows that a weak penalty parts: accuracies do not change any more
        warnings.simplefilter("ignore", ConvergenceWarning)
        return {l2: float(model.set_params(C=1 / (l2 * len(x))).fit(x, y).score(other_x, other_y)) for l2 in strengths}


def logistic_regression() -> LogisticRegression:
    """Make the classifier of `linear_probe`; scikit-learn's C is 1 / (l2 * rows)."""
    return LogisticRegression(warm_start=True, max_iter=1000, tol=1e-5)


def sgd_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    learning_rate: float = 1e-3,
    momentum: float = 0.9,
    batch_size: int = 1024,
    epochs: int = 100,
    seed: int = 0,
) -> float:
    """Train a linear layer by SGD and return its test accuracy after the last epoch, in [0, 1].

    The defaults are the protocol of the EMC² paper (arXiv 2404.10575): features as they are, constant learning rate, no
    weight decay. It stops far from the optimum, so the result depends on the features' scale; `linear_probe` does not.

    Args:
        train_x: (n, d).
        train_y: (n,), class numbers.
        test_x: (q, d).
        test_y: (q,), class numbers.
        learning_rate: of SGD.
        momentum: of SGD.
        batch_size: rows a step; the last batch of an epoch may be smaller.
        epochs: passes over the training rows.
        seed: of the initial weights and the order of rows.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, or negative labels.
    """
    check_pair(train_x, test_x)
    train_y, test_y = class_numbers(train_x, train_y), class_numbers(test_x, test_y)
    classes, train_y = torch.unique(train_y, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(train_x.shape[1], len(classes))
    for parameter in layer.parameters():  # PyTorch's own distribution, drawn from our generator
        nn.init.uniform_(parameter, -(train_x.shape[1] ** -0.5), train_x.shape[1] ** -0.5, generator=generator)
    layer.to(train_x.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=learning_rate, momentum=momentum)
    for _ in range(epochs):
        order = torch.randperm(len(train_x), generator=generator).to(train_x.device)
        for rows in torch.split(order, batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(train_x[rows].float()), train_y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        hits = classes[layer(test_x.float()).argmax(dim=1)] == test_y
    return float(hits.double().mean())
