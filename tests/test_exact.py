"""The chunked exact losses against dense float64 loops, torch's own gradients and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.exact import global_backward, global_contrastive_loss, two_tower_loss


def dense(z: Tensor, temperature: float | Tensor, positive_mass: float) -> Tensor:
    z = F.normalize(z, dim=2)
    m, views, _ = z.shape
    terms = []
    for i in range(m):
        for v in range(views):
            positives = [z[i, v] @ z[i, w] / temperature for w in range(views) if w != v]
            mass = sum(positive_mass * positive.exp() for positive in positives)
            for j in range(m):
                if j != i:
                    mass = mass + sum((z[i, v] @ z[j, w] / temperature).exp() for w in range(views))
            terms.append(mass.log() - torch.stack(positives).mean())
    return torch.stack(terms).mean()


def dense_towers(
    x: Tensor, y: Tensor, temperature: float | Tensor, positive_mass: float, x_ids: list[int], y_ids: list[int]
) -> Tensor:
    """The direction from x to y: rows are pairs, columns items of y that none of the row's item's pairs has."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    terms = []
    for i in range(len(x)):
        positive = x[i] @ y[i] / temperature
        own = {y_ids[k] for k in range(len(y)) if x_ids[k] == x_ids[i]}
        mass = positive_mass * positive.exp()
        for item in set(y_ids) - own:
            mass = mass + (x[i] @ y[y_ids.index(item)] / temperature).exp()
        terms.append(mass.log() - positive)
    return torch.stack(terms).mean()


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_same(loss: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """The same value, and the same gradient under a factor."""
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    got, want = (torch.autograd.grad(3 * value, leaves) for value in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("positive_mass", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_dense_computation(
    chunk_size: int | None, views: int, positive_mass: float, temperature: float
) -> None:
    z = double(9, views, 5).requires_grad_()
    learnt = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss = global_contrastive_loss(z, learnt, positive_mass=positive_mass, chunk_size=chunk_size)
    assert_same(loss, dense(z, learnt, positive_mass), z, learnt)
    plain = global_contrastive_loss(z, temperature, positive_mass=positive_mass, chunk_size=chunk_size)
    torch.testing.assert_close(plain, loss, rtol=0, atol=0)


IDS: dict[str, tuple[list[int] | None, list[int] | None]] = {
    "pairs": (None, None),
    "repeated pairs": ([4, 0, 9, 4, 9, 9, 2], None),
    "repeated keys": ([0, 1, 2, 3, 4, 5, 6], [8, 7, 8, 1, 7, 8, 2]),
    "several keys and queries of each other": ([3, 3, 1, 1, 5, 3, 6], [7, 2, 2, 9, 0, 9, 5]),
}


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("positive_mass", [0.0, 2.5])
@pytest.mark.parametrize("directions", ["both", "x->y", "y->x"])
def test_two_towers_equal_the_dense_computation(
    chunk_size: int | None, ids: str, positive_mass: float, directions: Directions
) -> None:
    x, y = (side.clone().requires_grad_() for side in double(2, 7, 5))
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    index, y_index = IDS[ids]
    x_ids = list(range(7)) if index is None else index
    y_ids = x_ids if y_index is None else y_index
    forth = dense_towers(x, y, temperature, positive_mass, x_ids, y_ids)
    back = dense_towers(y, x, temperature, positive_mass, y_ids, x_ids)
    expected = {"both": (forth + back) / 2, "x->y": forth, "y->x": back}[directions]
    loss = two_tower_loss(
        x,
        y,
        temperature,
        directions=directions,
        positive_mass=positive_mass,
        index=None if index is None else torch.tensor(index),
        y_index=None if y_index is None else torch.tensor(y_index),
        chunk_size=chunk_size,
    )
    assert_same(loss, expected, x, y, temperature)


@pytest.mark.parametrize("chunk_size", [4, None])
def test_gradients_are_those_of_finite_differences(chunk_size: int | None) -> None:
    z, temperature = double(4, 3, 3).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    x, y = (side.clone().requires_grad_() for side in double(2, 5, 3))
    ids, keys = torch.tensor([3, 3, 1, 2, 0]), torch.tensor([5, 6, 6, 7, 5])

    def one_tower(z: Tensor, temperature: Tensor) -> Tensor:
        return global_contrastive_loss(z, temperature, positive_mass=0.7, chunk_size=chunk_size)

    def two_towers(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
        return two_tower_loss(x, y, temperature, positive_mass=0.7, index=ids, y_index=keys, chunk_size=chunk_size)

    assert torch.autograd.gradcheck(one_tower, (z, temperature))
    assert torch.autograd.gradcheck(two_towers, (x, y, temperature))


def test_two_towers_of_equal_views_have_half_of_one_tower_s_negatives() -> None:
    """One tower has each of them twice, which costs log 2."""
    x = double(6, 4)
    twice = global_contrastive_loss(torch.stack([x, x], 1), 0.1)
    assert two_tower_loss(x, x, 0.1).item() == pytest.approx(twice.item() - math.log(2))


def test_collapse_costs_the_log_of_the_number_of_negatives() -> None:
    loss = global_contrastive_loss(torch.ones(500, 2, 4), 0.2)
    assert loss.item() == pytest.approx(math.log(998), abs=1e-4)


@pytest.mark.parametrize("positive_mass", [0.0, 2.5])
@pytest.mark.parametrize("chunks", [(1, 3), (4, 7), (100, 100)])
def test_two_passes_give_the_gradient_of_one(chunks: tuple[int, int], positive_mass: float) -> None:
    torch.manual_seed(0)
    images = torch.randn(9, 2, 5, dtype=torch.float64)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4)).double()
    expected = dense(net(images), temperature, positive_mass)
    want = torch.autograd.grad(expected, [*net.parameters(), temperature])
    embed_chunk_size, chunk_size = chunks
    loss = global_backward(
        lambda ids: net(images[ids]),
        9,
        temperature,
        positive_mass=positive_mass,
        embed_chunk_size=embed_chunk_size,
        chunk_size=chunk_size,
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    got = [parameter.grad for parameter in (*net.parameters(), temperature)]
    torch.testing.assert_close(got, list(want), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 4), (1, 2, 4), (5, 1, 4)])
def test_bad_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z must be \(m, views, d\)"):
        global_contrastive_loss(torch.randn(shape), 0.1)
    with pytest.raises(TypeError, match=r"z must have a floating-point dtype, got torch.int64"):
        global_contrastive_loss(torch.ones(3, 2, 4, dtype=torch.int64), 0.1)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        global_contrastive_loss(torch.randn(3, 2, 4), 0.1, chunk_size=0)
    with pytest.raises(ValueError, match=r"temperature must be a positive number .*, got 0\.0"):
        global_contrastive_loss(torch.randn(3, 2, 4), 0.0)
    with pytest.raises(ValueError, match=r"temperature must be a positive number .*, got -1\.0"):
        global_contrastive_loss(torch.randn(3, 2, 4), torch.tensor(-1.0))
    with pytest.raises(ValueError, match=r"temperature must be .* without dimensions, got \(3,\)"):
        global_contrastive_loss(torch.randn(3, 2, 4), torch.full((3,), 0.1))
    with pytest.raises(ValueError, match="positive_mass must be a number from 0, got -1"):
        global_contrastive_loss(torch.randn(3, 2, 4), 0.1, positive_mass=-1)


def test_what_cannot_be_contrasted_is_named() -> None:
    x, y = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"x and y must be \(m, d\) pairs with m >= 2, got \(4, 3\) and \(3, 3\)"):
        two_tower_loss(x, y[:3], 0.1)
    with pytest.raises(
        TypeError, match=r"x and y must share a floating-point dtype, got torch.float32 and torch.float64"
    ):
        two_tower_loss(x, y.double(), 0.1)
    with pytest.raises(ValueError, match="directions must be one of both, x->y, y->x, got 'forth'"):
        two_tower_loss(x, y, 0.1, directions="forth")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"y_index must be \(4,\) integers, got \(4,\) of torch.float32"):
        two_tower_loss(x, y, 0.1, index=torch.arange(4), y_index=torch.ones(4))
    with pytest.raises(ValueError, match="row 1 has no negative: all items are paired with it"):
        two_tower_loss(x, y, 0.1, index=torch.tensor([0, 1, 1, 1]), y_index=torch.tensor([5, 5, 6, 7]))
    with pytest.raises(ValueError, match=r"y\[2\] is not finite"):
        two_tower_loss(x, y.index_fill(0, torch.tensor(2), torch.inf), 0.1)


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
        (gradient,) = torch.autograd.grad(inside, z)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    torch.testing.assert_close(gradient, *torch.autograd.grad(plain, z), rtol=0, atol=0)


def test_a_second_derivative_is_refused() -> None:
    z = torch.randn(4, 2, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(global_contrastive_loss(z, 0.5), z, create_graph=True)
