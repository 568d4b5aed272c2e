"""The measure of errors against cases whose error is known; and the claim the library stands for."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, SogCLRLoss
from torch_emc2.batch import Directions
from torch_emc2.diagnostics import (
    IdsOf,
    MakeLoss,
    clustered_embeddings,
    clustered_pairs,
    gradient_error,
    parameter_gradient,
    two_tower_error,
)
from torch_emc2.exact import global_contrastive_loss, two_tower_loss
from torch_emc2.losses import ContrastiveLoss


class Noisy:
    """A loss of its own, whose mean gradient over an epoch is a given one and noise, drawn anew for each batch."""

    def __init__(self, gradient: Tensor, batches: int, std: float, seed: int) -> None:
        self.gradient, self.batches, self.std = gradient, batches, std
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, z1, z2, index=None, encode=None):  # type: ignore[no-untyped-def]
        own = self.batches * self.gradient[index[:, 0] // 2]
        noise = self.std * torch.randn(own.shape, dtype=own.dtype, generator=self.generator)
        self.last = {"std": noise.std()}
        return ((own + noise) * torch.stack([z1, z2], 1)).sum()


def exact_gradient(z: Tensor, temperature: float) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(global_contrastive_loss(z, temperature), z)[0]


def test_dcl_on_the_whole_data_set_has_no_error() -> None:
    error = gradient_error(
        lambda _: DCLLoss(0.07), clustered_embeddings(40).double(), 0.07, 40, epochs=2, mixing_epochs=0, runs=2
    )
    assert error.one_epoch < 1e-20
    assert abs(error.squared_bias) < 1e-20


def test_infonce_on_the_whole_data_set_errs_by_the_positive_in_its_denominator() -> None:
    z = clustered_embeddings(40).double()
    error = gradient_error(lambda _: InfoNCELoss(0.07), z, 0.07, 40, epochs=2, mixing_epochs=0, runs=2)
    z.requires_grad_()
    (exact,) = torch.autograd.grad(global_contrastive_loss(z, 0.07), z)
    (with_positive,) = torch.autograd.grad(global_contrastive_loss(z, 0.07, positive_mass=1.0), z)
    expected = float((with_positive - exact).square().sum() / exact.square().sum())
    assert error.squared_bias == pytest.approx(expected, rel=1e-9)
    assert error.one_epoch == pytest.approx(expected, rel=1e-9)


def test_views_drawn_anew_are_all_views_on_average() -> None:
    """At a temperature so high that all negatives weigh the same, a batch of all samples errs by the draw alone."""
    z = clustered_embeddings(12, 4, views=4).double()
    error = gradient_error(lambda _: DCLLoss(1e4), z, 1e4, 12, ids="sample", epochs=400, mixing_epochs=0, runs=4)
    assert error.one_epoch > 0.5  # half of the views have no gradient in an epoch
    assert error.squared_error[-1] == pytest.approx(error.one_epoch / 400, rel=0.3)
    assert abs(error.squared_bias) < 0.1 * error.squared_error[-1]


def test_squared_bias_is_free_of_variance() -> None:
    # Exact weights on half of the data set at a time: each batch errs, their mean over epochs hardly does at this β.
    z = clustered_embeddings(40)
    error = gradient_error(lambda _: DCLLoss(5.0), z, 5.0, 20, epochs=200, mixing_epochs=0, runs=3)
    assert error.squared_bias < 0.05 * error.one_epoch


def test_emc2_has_a_third_of_the_bias_of_dcl_and_sogclr() -> None:
    z = clustered_embeddings()
    m = len(z)
    makers: dict[str, Callable[[int], ContrastiveLoss]] = {
        "emc2": lambda seed: EMC2Loss(2 * m, 0.07, carry="encode", seed=seed),
        "drop": lambda seed: EMC2Loss(2 * m, 0.07, carry="drop", seed=seed),
        "dcl": lambda seed: DCLLoss(0.07),
        "sogclr": lambda seed: SogCLRLoss(2 * m, 0.07, gamma=0.9),
    }
    bias = {name: gradient_error(make, z, 0.07, 32, epochs=30, runs=2).squared_bias for name, make in makers.items()}
    assert bias["emc2"] < bias["dcl"] / 3
    assert bias["emc2"] < bias["sogclr"] / 3
    assert bias["emc2"] < bias["drop"] / 3


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_variance_falls_as_one_over_n_and_the_bias_stays(offset: float) -> None:
    z = clustered_embeddings(40).double()
    exact = exact_gradient(z, 0.5)
    norm = float(exact.square().sum())
    error = gradient_error(
        lambda seed: Noisy((1 + offset) * exact, 4, 0.01, seed), z, 0.5, 10, epochs=24, mixing_epochs=1, runs=4
    )
    variance = exact.numel() * 0.01**2 / 4**2 / norm  # the noise of 4 batches fills the epoch's gradient, over 4
    assert error.epochs == [1, 2, 4, 8, 16, 24]
    expected = [offset**2 + variance / n for n in error.epochs]
    assert error.squared_error == pytest.approx(expected, rel=0.05)
    assert error.one_epoch == error.squared_error[0]
    assert error.squared_bias == pytest.approx(offset**2, rel=0.02, abs=0.01 * variance)
    assert error.variance == pytest.approx(variance, rel=0.05)
    assert error.last["std"] == pytest.approx(0.01, rel=0.02)


def test_bias_and_variance_are_those_over_all_ways_to_split_the_data() -> None:
    z = clustered_embeddings(4).double()
    exact = exact_gradient(z, 0.2)
    epochs = []
    for split in (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))):  # equally likely
        leaf = z.clone().requires_grad_()
        loss = torch.zeros(())
        for pair in split:
            for i, j in (pair, pair[::-1]):
                for view in range(2):
                    anchor = leaf[i, view]
                    loss = loss - anchor @ leaf[i, 1 - view] / 0.2 + (leaf[j] @ anchor / 0.2).logsumexp(0)
        unit = torch.autograd.grad(loss / 8, leaf)[0]  # mean over two batches of four rows each
        epochs.append(unit - (unit * z).sum(2, keepdim=True) * z)  # through the normalisation
    each = torch.stack(epochs)
    norm = exact.square().sum()
    bias = float((each.mean(0) - exact).square().sum() / norm)
    along_bias = ((each - each.mean(0)) * (each.mean(0) - exact)).sum((1, 2, 3)) / norm
    chance = float(2 * along_bias.square().mean().sqrt()) / 1600**0.5  # of 4 runs of 400 epochs
    variance = float((each - each.mean(0)).square().sum((1, 2, 3)).mean() / norm)
    error = gradient_error(lambda _: DCLLoss(0.2), z, 0.2, 2, epochs=400, mixing_epochs=0, runs=4)
    assert bias > 10 * chance
    assert error.squared_bias == pytest.approx(bias, abs=3 * chance)
    assert error.variance == pytest.approx(variance, rel=0.05)


def test_epochs_of_mixing_are_left_out() -> None:
    z = clustered_embeddings(40).double()
    exact = exact_gradient(z, 0.5)

    class Settling(Noisy):
        """Three times the gradient in the first two epochs."""

        calls = 0

        def __call__(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            self.calls += 1
            return (3 if self.calls <= 2 * self.batches else 1) * super().__call__(*args, **kwargs)

    def measure(mixing_epochs: int) -> list[float]:
        error = gradient_error(
            lambda seed: Settling(exact, 4, 0.0, seed), z, 0.5, 10, epochs=3, mixing_epochs=mixing_epochs, runs=2
        )
        assert error.squared_bias == pytest.approx(error.squared_error[-1])
        return error.squared_error

    # Errors 2, 0, 0 of the exact gradient: one at a time, the first two together, all three.
    assert measure(1) == pytest.approx([4 / 3, 1, 4 / 9])
    assert measure(2) == pytest.approx([0, 0, 0], abs=1e-20)


def test_the_bias_is_the_mean_over_all_pairs_of_runs_and_has_their_spread() -> None:
    z, errors = clustered_embeddings(40).double(), (0.1, 0.2, 0.4, -0.3)
    exact = exact_gradient(z, 0.5)

    def measure(runs: int) -> tuple[float, float]:
        error = gradient_error(
            lambda seed: Noisy((1 + errors[seed]) * exact, 4, 0.0, seed),
            z,
            0.5,
            10,
            epochs=1,
            mixing_epochs=0,
            runs=runs,
        )
        return error.squared_bias, error.standard_error

    pairs = [0.02, 0.04, -0.03, 0.08, -0.06, -0.12]
    bias = sum(pairs) / 6
    spread = math.sqrt(sum((pair - bias) ** 2 for pair in pairs) / 5)
    assert measure(4) == pytest.approx((bias, spread / math.sqrt(6)))
    assert measure(2) == pytest.approx((0.02, math.nan), nan_ok=True)


@pytest.mark.parametrize("ids", ["sample", "view"])
def test_ids_and_what_they_encode(ids: IdsOf) -> None:
    z, samples = torch.randn(10, 2, 3), []
    both_views_seen = set()

    class Spy(Noisy):
        def __call__(self, z1, z2, index=None, encode=None):  # type: ignore[no-untyped-def]
            own = index if ids == "sample" else index[:, 0] // 2
            samples.append(own)
            torch.testing.assert_close((z1, z2), (z[own, 0], z[own, 1]))
            if ids != "sample":
                assert torch.equal(index, torch.stack([2 * own, 2 * own + 1], 1))
            met = encode(torch.arange(10 if ids == "sample" else 20))
            if ids == "sample":
                views = (met[:, None] == z).all(2)  # (10, 2): which view of its sample
                assert (views.sum(1) == 1).all()
                both_views_seen.update(views.nonzero()[:, 1].tolist())
            else:
                torch.testing.assert_close(met, z.flatten(0, 1))
            return z1.sum() + z2.sum()

    gradient_error(lambda seed: Spy(z, 2, 0.0, seed), z, 0.5, 4, ids=ids, epochs=3, mixing_epochs=1, runs=2)
    assert both_views_seen == ({0, 1} if ids == "sample" else set())
    assert [len(own) for own in samples] == 2 * 4 * 2 * [4]  # two runs of four epochs of two batches: two are left out
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        assert len(torch.cat([first, second]).unique()) == 8


def test_errors_at_the_parameters_are_those_of_the_losses_of_a_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x = torch.randn(12, 2, 6, dtype=torch.float64)
    parameters = list(network.parameters())
    to_parameters = parameter_gradient(lambda ids: network(x[ids]), parameters, 12, chunk_size=5)
    error = gradient_error(
        lambda _: InfoNCELoss(0.3), network(x), 0.3, 12, epochs=3, mixing_epochs=0, runs=2, to_parameters=to_parameters
    )
    exact, with_positive = (
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        for loss in (
            global_contrastive_loss(network(x), 0.3),
            global_contrastive_loss(network(x), 0.3, positive_mass=1.0),
        )
    )
    expected = float((with_positive - exact).square().sum() / exact.square().sum())
    assert error.at_parameters is not None
    assert error.at_parameters.epochs == [1, 2, 3]
    assert error.at_parameters.squared_error == pytest.approx([expected] * 3, rel=1e-9)
    assert error.at_parameters.squared_bias == pytest.approx(expected, rel=1e-9)
    assert error.at_parameters.variance == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("wrong", [{"runs": 1}, {"epochs": 0}, {"batch_size": 41}, {"batch_size": 1}])
def test_what_cannot_be_measured_is_refused(wrong: dict[str, int]) -> None:
    arguments = {"batch_size": 8, "epochs": 1, "runs": 2} | wrong
    with pytest.raises(ValueError, match="runs must be at least 2, epochs at least 1 and batch_size from 2 to the 40"):
        gradient_error(lambda _: DCLLoss(0.1), torch.randn(40, 2, 4), 0.1, **arguments)
    with pytest.raises(ValueError, match="runs must be at least 2, epochs at least 1 and batch_size from 2 to the 40"):
        two_tower_error(lambda _: DCLLoss(0.1, towers=2), *torch.randn(2, 40, 4), 0.1, **arguments)


def cross_entropy(x, y, index, encode, logit_scale):  # type: ignore[no-untyped-def]
    """CLIP's loss, as anyone would write it."""
    logits = logit_scale * nn.functional.normalize(x) @ nn.functional.normalize(y).T
    own = torch.arange(len(x))
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


@pytest.mark.parametrize("directions", ["both", "x->y", "y->x"])
def test_two_towers_on_the_whole_data_set_have_no_error(directions: Directions) -> None:
    def measure(make_loss: MakeLoss, positive_mass: float) -> list[float]:
        x, y = (side.double() for side in clustered_pairs(30))
        lengths = {"epochs": 2, "mixing_epochs": 0, "runs": 2}
        errors = two_tower_error(
            make_loss, x, y, 0.07, 30, directions=directions, positive_mass=positive_mass, **lengths
        )
        return [error.one_epoch for error in errors[:3]]

    assert max(measure(lambda _: DCLLoss(0.07, towers=2, directions=directions), 0.0)) < 1e-20
    assert max(measure(lambda _: InfoNCELoss(0.07, towers=2, directions=directions), 1.0)) < 1e-20
    if directions == "both":
        assert max(measure(lambda _: cross_entropy, 1.0)) < 1e-20
    assert min(measure(lambda _: cross_entropy, 0.0)) > 0.01


def test_errors_at_the_parameters_of_two_towers_are_those_of_the_losses_of_both_networks() -> None:
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double() for _ in range(2)]
    x, y = torch.randn(2, 12, 6, dtype=torch.float64)
    parameters = [each for network in networks for each in network.parameters()]

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([networks[0](x[ids]), networks[1](y[ids])], 1)

    to_parameters = parameter_gradient(embed, parameters, 12, chunk_size=5)
    errors = two_tower_error(
        lambda _: InfoNCELoss(0.3, towers=2),
        *embed(torch.arange(12)).unbind(1),
        0.3,
        12,
        epochs=3,
        mixing_epochs=0,
        runs=2,
        to_parameters=to_parameters,
    )
    exact, with_positive = (
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        for loss in (
            two_tower_loss(networks[0](x), networks[1](y), 0.3),
            two_tower_loss(networks[0](x), networks[1](y), 0.3, positive_mass=1.0),
        )
    )
    expected = float((with_positive - exact).square().sum() / exact.square().sum())
    assert errors.at_parameters is not None
    assert errors.at_parameters.squared_error == pytest.approx([expected] * 3, rel=1e-9)
    assert errors.at_parameters.squared_bias == pytest.approx(expected, rel=1e-9)


def test_errors_of_x_y_and_beta_are_told_apart() -> None:
    x, y = (side.double().requires_grad_() for side in clustered_pairs(20))
    beta = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(two_tower_loss(x, y, 1 / beta), (x, y, beta))
    seen = []

    def loss(x_batch, y_batch, index, encode, logit_scale):  # type: ignore[no-untyped-def]
        seen.append(index)
        encode_x, encode_y = encode
        torch.testing.assert_close((encode_x(index), encode_y(index)), (x_batch, y_batch))
        at_x, at_y, at_beta = gradients
        batches = 20 // 5
        through_encode = (1.2 * batches * at_y[index] * encode_y(index)).sum()
        return (0.9 * batches * at_x[index] * x_batch).sum() + through_encode + 1.5 * at_beta * logit_scale

    errors = two_tower_error(lambda _: loss, x, y, 0.2, 5, epochs=3, mixing_epochs=1, runs=2)
    assert [error.squared_bias for error in errors[:3]] == pytest.approx([0.01, 0.04, 0.25])
    assert [error.one_epoch for error in errors[:3]] == pytest.approx([0.01, 0.04, 0.25])
    assert len(seen) == 2 * 4 * 4
    assert all(len(torch.cat(seen[k : k + 4]).unique()) == 20 for k in range(0, 32, 4))
