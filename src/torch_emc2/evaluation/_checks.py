"""What every evaluation asks of its inputs."""

from torch import Tensor


def check_matrix(name: str, x: Tensor, rows: int = 1) -> None:
    """Raise unless x is a finite matrix of at least so many rows."""
    if x.ndim != 2 or len(x) < rows or x.shape[1] < 1:
        raise ValueError(f"{name} features have shape {tuple(x.shape)}; give a matrix (n, d) with n >= {rows}, d >= 1")
    if x.is_complex():
        raise ValueError(f"{name} features are {x.dtype}; give real numbers")
    suspects = (~x.sum(dim=1).isfinite()).nonzero()[:, 0]  # or their sum alone is too large; several times as fast
    if broken := suspects[~x[suspects].isfinite().all(dim=1)].tolist():
        raise ValueError(f"{name} features are not finite in row {broken[0]}; check the encoder's weights and images")


def check_pair(train_x: Tensor, test_x: Tensor) -> None:
    """Raise unless both are finite feature matrices of one width."""
    check_matrix("training", train_x)
    check_matrix("test", test_x)
    if train_x.shape[1] != test_x.shape[1]:
        widths = f"{train_x.shape[1]} and {test_x.shape[1]}"
        raise ValueError(f"training and test features have widths {widths}; take both from one encoder")


def class_numbers(x: Tensor, y: Tensor) -> Tensor:
    """Return y as int64; raise unless it holds one class number per row of x."""
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels have shape {tuple(y.shape)} for features {tuple(x.shape)}; give one label a row")
    if y.is_floating_point() or y.is_complex():
        raise ValueError(f"labels must be class numbers, integers from 0, got {y.dtype}")
    numbers = y.long()
    if len(y) > 0 and numbers.min() < 0:
        raise ValueError(f"labels must be class numbers, integers from 0, got minimum {numbers.min().item()}")
    return numbers
