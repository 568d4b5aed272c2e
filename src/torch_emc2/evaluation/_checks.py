"""What every evaluation asks of its inputs."""

from torch import Tensor


def check_pair(train_x: Tensor, test_x: Tensor) -> None:
    """Raise unless both are finite feature matrices of one width."""
    for name, x in (("training", train_x), ("test", test_x)):
        if x.ndim != 2 or len(x) == 0:
            raise ValueError(f"{name} features have shape {tuple(x.shape)}; give a matrix (n, d) with n >= 1")
        finite = x.isfinite().all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"{name} features are not finite in row {row}; check the encoder's weights and images")
    if train_x.shape[1] != test_x.shape[1]:
        widths = f"{train_x.shape[1]} and {test_x.shape[1]}"
        raise ValueError(f"training and test features have widths {widths}; take both from one encoder")


def check_labelled(x: Tensor, y: Tensor) -> None:
    """Raise unless y holds one class number per row of x."""
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels have shape {tuple(y.shape)} for features {tuple(x.shape)}; give one label a row")
    if y.is_floating_point() or (len(y) > 0 and int(y.min()) < 0):
        raise ValueError(f"labels must be class numbers 0, 1, ..., got {y.dtype} with minimum {y.min().item()}")
