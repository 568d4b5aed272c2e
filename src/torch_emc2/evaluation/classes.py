"""Which classes can be tested, and what is said of those that cannot."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["classifiable"]

_NAMED = 10


def classifiable(train_y: Tensor | None, test_y: Tensor | None, classes: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Return the rows of a test part that can be classified, and notes on what cannot be, a line each.

    A test image whose class has no training image would always count as wrong. No row is returned where there is
    nothing to classify: without labels, or where all training images are of one class.

    Args:
        train_y: (n,), class numbers; None without labels.
        test_y: (q,), class numbers; None without labels.
        classes: their names.
    """

    def names(numbers: Tensor) -> str:
        shown = ", ".join(repr(classes[number]) for number in numbers[:_NAMED].tolist())
        return shown + (", …" if len(numbers) > _NAMED else "")

    none = torch.empty(0, dtype=torch.int64)
    if train_y is None or test_y is None:
        return none, [f"no accuracies: the {'training' if train_y is None else 'test'} images have no labels"]
    train_y, test_y = train_y.long(), test_y.long()  # torch knows little of other unsigned integers
    known, tested = torch.unique(train_y), torch.unique(test_y)
    if len(known) < 2:
        return none, [f"no accuracies: all training images are of one class, {names(known)}"]
    strange, untested = tested[~torch.isin(tested, known)], known[~torch.isin(known, tested)]
    rows = torch.isin(test_y, known).nonzero()[:, 0]
    if len(rows) == 0:
        return none, [f"no accuracies: the test images' classes have no training images: {names(strange)}"]
    notes = []
    if len(strange) > 0:
        left_out = f"test images left out: {len(test_y) - len(rows)}"
        notes.append(f"classes without training images: {len(strange)} ({names(strange)}); {left_out}")
    if len(untested) > 0:
        notes.append(f"classes without test images, not tested: {len(untested)} ({names(untested)})")
    return rows, notes
