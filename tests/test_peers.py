"""Other libraries' losses as the benchmarks call them, against ours where the objective is the same."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_emc2 import DCLLoss, InfoNCELoss
from torch_emc2.diagnostics import clustered_embeddings, gradient_error

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from peers import Peer, peers

M, T = 40, 0.2
PACKAGES = {"lightly": 2, "pytorch_metric_learning": 1, "libauc": 1, "sentence_transformers": 1}  # losses of each


def other_view(z1: Tensor, z2: Tensor, index: Tensor) -> Tensor:
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / T
    own = torch.arange(len(z1))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


SAME: dict[str, Callable[..., Tensor]] = {
    "lightly, NTXentLoss": InfoNCELoss(T),
    "lightly, DCLLoss": DCLLoss(T),
    "pytorch-metric-learning, NTXentLoss": InfoNCELoss(T),
    "LibAUC, GCLoss_v1": DCLLoss(T),  # at the first visit, and in its gradient
    "sentence-transformers, MultipleNegativesRankingLoss (other view)": other_view,
}


@pytest.mark.parametrize("title", SAME)
def test_the_same_objective_has_the_same_value_and_gradient(title: str) -> None:
    if title not in peers(M, T):
        pytest.skip(f"{title.partition(',')[0]} is not installed")
    z1, z2 = (3 * torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))).requires_grad_().unbind()
    for index in (torch.arange(6), torch.arange(12).view(6, 2)):
        got, want = (loss(z1, z2, index) for loss in (peers(M, T)[title](0), SAME[title]))
        if not title.startswith("LibAUC"):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(loss, (z1, z2)) for loss in (got, want)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_one_that_remembers_is_given_samples() -> None:
    seen = []
    loss = Peer(lambda z1, z2, index: seen.append(index) or z1.sum(), T, scale=0.5, indexed=True)  # type: ignore[arg-type, func-returns-value]
    z, index = torch.ones(3, 2), torch.tensor([4, 2, 7])
    assert loss(z, z, index) == loss(z, z, 2 * index[:, None] + torch.arange(2), encode=z.__getitem__) == 3
    assert all(torch.equal(each, index) for each in seen)


def test_their_errors_are_measured_as_ours_are() -> None:
    z = clustered_embeddings(M)
    measured = gradient_error(lambda _: Peer(lambda a, b: InfoNCELoss(T)(a, b), T), z, 8, epochs=2, runs=2)  # type: ignore[arg-type, return-value]
    assert measured.squared_error == gradient_error(lambda _: InfoNCELoss(T), z, 8, epochs=2, runs=2).squared_error
    assert measured.last == {}


def test_what_is_not_installed_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = len(peers(M, T))
    for package, losses in PACKAGES.items():
        listed = len(peers(M, T))
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
        assert len(peers(M, T)) in (listed - losses, listed)
    assert peers(M, T) == {}
    assert here <= len(SAME)
