"""The chunked exact loss against a dense float64 computation and torch's own gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_emc2.exact import global_backward, global_contrastive_loss


def dense(z: Tensor, temperature: float, include_positive: bool) -> Tensor:
    z = F.normalize(z, dim=2)
    m, views, _ = z.shape
    terms = []
    for i in range(m):
        for v in range(views):
            positives = [z[i, v] @ z[i, w] / temperature for w in range(views) if w != v]
            negatives = [z[i, v] @ z[j, w] / temperature for j in range(m) for w in range(views) if j != i]
            denominator = negatives + positives if include_positive else negatives
            terms.append(torch.stack(denominator).logsumexp(0) - torch.stack(positives).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("include_positive", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_dense_computation(
    chunk_size: int | None, views: int, include_positive: bool, temperature: float
) -> None:
    z = torch.randn(9, views, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = global_contrastive_loss(z, temperature, chunk_size=chunk_size, include_positive=include_positive)
    expected = dense(z, temperature, include_positive)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    (got,), (want,) = torch.autograd.grad(3 * loss, z), torch.autograd.grad(3 * expected, z)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_collapse_costs_the_log_of_the_number_of_negatives() -> None:
    loss = global_contrastive_loss(torch.ones(500, 2, 4), 0.2)
    assert loss.item() == pytest.approx(math.log(998), abs=1e-4)


@pytest.mark.parametrize("include_positive", [False, True])
@pytest.mark.parametrize("chunks", [(1, 3), (4, 7), (100, 100)])
def test_two_passes_give_the_gradient_of_one(chunks: tuple[int, int], include_positive: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(9, 2, 5, dtype=torch.float64)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4)).double()
    expected = dense(net(images), 0.2, include_positive)
    want = torch.autograd.grad(expected, list(net.parameters()))
    embed_chunk_size, chunk_size = chunks
    loss = global_backward(
        lambda ids: net(images[ids]),
        9,
        0.2,
        embed_chunk_size=embed_chunk_size,
        chunk_size=chunk_size,
        include_positive=include_positive,
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    got = [parameter.grad for parameter in net.parameters()]
    torch.testing.assert_close(got, list(want), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 4), (1, 2, 4), (5, 1, 4)])
def test_bad_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z must be \(m, views, d\)"):
        global_contrastive_loss(torch.randn(shape), 0.1)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        global_contrastive_loss(torch.randn(3, 2, 4), 0.1, chunk_size=0)
    with pytest.raises(ValueError, match=r"temperature must be a positive number .*, got 0\.0"):
        global_contrastive_loss(torch.randn(3, 2, 4), 0.0)
    with pytest.raises(TypeError, match=r"temperature .* cannot be learnt yet"):
        global_contrastive_loss(torch.randn(3, 2, 4), torch.tensor(0.1, requires_grad=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "what"), [(torch.nan, "is not finite"), (0.0, "has length 0 and so no direction")])
def test_an_embedding_without_direction_is_named(value: float, what: str) -> None:
    z = torch.ones(3, 2, 4)
    z[2, 1] = value
    with pytest.raises(ValueError, match=rf"z\[2, 1\] {what}"):
        global_contrastive_loss(z, 0.1)


def test_autocast_does_not_touch_it() -> None:
    z = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = global_contrastive_loss(z, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = global_contrastive_loss(z, 0.07)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(inside, z), torch.autograd.grad(plain, z), rtol=0, atol=0)


def test_a_second_derivative_is_refused() -> None:
    z = torch.randn(4, 2, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(global_contrastive_loss(z, 0.5), z, create_graph=True)
