"""What a step of a small batch costs is tensor operations: so many, and no more. (Seconds are for benchmarks/.)"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_emc2 import EMC2Loss, InfoNCELoss
from torch_emc2.losses import ContrastiveLoss

N, B, D = 1000, 32, 16
VIEWS = {"view", "detach", "slice", "select", "unsqueeze", "permute", "transpose", "t", "expand", "alias", "split"}
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "equal"}  # a GPU's host waits for their results


class _Operations(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(loss_fn: ContrastiveLoss) -> Counter[str]:
    """Of one forward and backward pass, when chains have begun."""
    for _ in range(3):
        x, y = (torch.randn(B, D).requires_grad_() for _ in range(2))
        with _Operations() as mode:
            loss_fn(x, y, torch.randperm(N)[:B]).backward()
    return mode.calls


@pytest.mark.parametrize(
    ("loss_fn", "most"),
    [
        (InfoNCELoss(), 41),
        (EMC2Loss(N, kernel="metropolis"), 62),
        (EMC2Loss(N, kernel="metropolis", num_chains=4), 62),
        (EMC2Loss(N, kernel="isir"), 62),
        (EMC2Loss(N, kernel="metropolis", carry="defer"), 70),
        (EMC2Loss(N, kernel="isir", num_remembered=512), 100),
    ],
)
def test_a_step_has_few_operations(loss_fn: ContrastiveLoss, most: int) -> None:
    calls = operations(loss_fn)
    assert sum(count for name, count in calls.items() if name not in VIEWS) <= most, calls
    assert sum(calls[name] for name in WAITS) == 0, calls


@pytest.mark.parametrize("kernel", ["metropolis", "isir"])
def test_a_step_asks_for_values_twice(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For lengths, of which an error tells, and for ids; on a GPU each is a wait, where the ids are there."""
    loss_fns, asked, tolist = (InfoNCELoss(), EMC2Loss(N, kernel=kernel), EMC2Loss(N, carry="defer")), [], Tensor.tolist

    def count(self: Tensor) -> Any:
        asked.append(self.shape)
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", count)
    for loss_fn in loss_fns:
        for _ in range(2):
            asked.clear()
            loss_fn(torch.randn(B, D), torch.randn(B, D), torch.randperm(N)[:B])
        assert asked == [(2,), (B,)]
