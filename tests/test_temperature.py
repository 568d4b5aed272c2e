"""Which temperatures there are, and what is learnt of one."""

import copy
import math
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss, Temperature
from torch_emc2.losses import ContrastiveLoss
from torch_emc2.temperature import require_temperature


@pytest.mark.parametrize("value", [1, 0.5, 1e-30, 1e300, Fraction(1, 3), np.float32(0.1), np.int64(2)])
def test_positive_numbers_are_taken_as_they_are(value: object) -> None:
    temperature = require_temperature(value)
    assert type(temperature) is float
    assert temperature == float(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -0.1, 1e-31, float("nan"), float("inf"), 10**400])
def test_other_numbers_are_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"temperature must be a positive number \(at least 1e-30\), got"):
        require_temperature(value)


@pytest.mark.parametrize("value", [torch.tensor(0.1), torch.nn.Parameter(torch.tensor(0.1))])
def test_a_tensor_is_told_how_it_is_learnt(value: object) -> None:
    with pytest.raises(TypeError, match=r"must be a number, .*got a \w+: to learn it give Temperature\(0\.07\)$"):
        require_temperature(value)


@pytest.mark.parametrize("value", [None, "0.1", True, np.array(0.1), [0.1]])
def test_what_is_no_number_is_named(value: object) -> None:
    with pytest.raises(TypeError, match=rf"must be a number, such as 0\.07, got {re.escape(repr(value))}$"):
        require_temperature(value)


def test_what_is_learnt_is_the_logarithm_of_beta() -> None:
    """By CLIP's convention."""
    temperature = Temperature(0.07)
    assert [name for name, _ in temperature.named_parameters()] == ["logit_scale"]
    assert temperature.logit_scale.shape == ()
    assert temperature.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert temperature().item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("make", [InfoNCELoss, lambda temperature: EMC2Loss(9, temperature)])
def test_a_scale_in_the_place_of_a_temperature_is_told_of(make: Callable[[float], ContrastiveLoss]) -> None:
    loss_fn = make(0.1)
    for call in (lambda: make(20), lambda: setattr(loss_fn, "temperature", 20), lambda: Temperature(20)):
        with pytest.warns(UserWarning, match=r"temperature is 1 / scale: 20 tells nothing apart, 0\.05 may") as told:
            call()
        assert [each.filename for each in told] == [__file__]


def test_a_temperature_is_clamped_where_it_is_used() -> None:
    temperature = Temperature(0.02, min=0.01)
    with torch.no_grad():
        temperature.logit_scale += 5
    assert temperature().item() == pytest.approx(100)
    assert float(temperature.logit_scale) == pytest.approx(math.log(100))  # and is not lost beyond
    temperature().backward()
    assert float(temperature.logit_scale.grad) == pytest.approx(100)  # which an optimiser can lead back
    with pytest.raises(ValueError, match=r"must not be below min=0\.01, got 0\.005"):
        Temperature(0.005)


X, Y, INDEX = (*torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(6))

MAKERS: dict[str, Callable[..., ContrastiveLoss]] = {
    "infonce": lambda **settings: InfoNCELoss(**settings),
    "dcl": lambda **settings: DCLLoss(**settings),
    "sogclr": lambda **settings: SogCLRLoss(6, gamma=0.5, **settings),
    "negative-cache": lambda **settings: NegativeCacheLoss(6, 4, **settings),
    "emc2": lambda **settings: EMC2Loss(6, **settings),
    "isir": lambda **settings: EMC2Loss(6, kernel="isir", **settings),
}
each_loss = pytest.mark.parametrize("name", MAKERS)
each_geometry = pytest.mark.parametrize("towers", [1, 2])


@each_loss
@each_geometry
def test_it_is_a_parameter_and_part_of_the_state(name: str, towers: int) -> None:
    loss_fn = MAKERS[name](temperature=Temperature(0.1), towers=towers)
    assert [name for name, _ in loss_fn.named_parameters()] == ["temperature.logit_scale"]
    optimiser = torch.optim.SGD(loss_fn.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        loss_fn(X, Y, INDEX).backward()
        before = float(loss_fn.temperature.logit_scale)
        slope = float(loss_fn.temperature.logit_scale.grad)
        optimiser.step()
        assert slope != 0
        assert float(loss_fn.temperature.logit_scale) == pytest.approx(before - 0.1 * slope)
    loaded = MAKERS[name](temperature=Temperature(0.5), towers=towers)
    loaded.load_state_dict(loss_fn.state_dict())
    assert torch.equal(loaded.temperature.logit_scale, loss_fn.temperature.logit_scale)
    torch.testing.assert_close(loaded(X, Y, INDEX), loss_fn(X, Y, INDEX), rtol=0, atol=0)


@each_loss
@each_geometry
def test_all_ways_to_give_a_temperature_are_one(name: str, towers: int) -> None:
    """A number, a module, a caller's β: value, gradient at the embeddings, and of the last two at log β and β."""
    learnt = MAKERS[name](temperature=Temperature(0.25), towers=towers)
    plain = MAKERS[name](temperature=0.25, towers=towers)
    given = MAKERS[name](temperature=0.9, towers=towers)
    for step in range(3):
        outcomes = []
        beta = torch.tensor(4.0, requires_grad=True)
        for loss_fn, extra in ((plain, {}), (learnt, {}), (given, {"logit_scale": beta})):
            x, y = (z.roll(step, 0).clone().requires_grad_() for z in (X, Y))
            loss = loss_fn(x, y, INDEX, **extra)
            loss.backward()
            outcomes.append((loss.detach(), x.grad, y.grad))
        torch.testing.assert_close(outcomes[1], outcomes[0])
        torch.testing.assert_close(outcomes[2], outcomes[0])
        assert float(learnt.temperature.logit_scale.grad) == pytest.approx(4 * float(beta.grad), rel=1e-5)
        learnt.zero_grad()


@each_loss
def test_a_constant_in_the_call_gets_no_gradient(name: str) -> None:
    x = X.clone().requires_grad_()
    MAKERS[name](temperature=0.9)(x, Y, INDEX, logit_scale=torch.tensor(4.0)).backward()
    plain = X.clone().requires_grad_()
    MAKERS[name](temperature=0.25)(plain, Y, INDEX).backward()
    torch.testing.assert_close(x.grad, plain.grad)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_beta_is_named(value: float) -> None:
    with pytest.raises(ValueError, match="logit_scale must be one positive number"):
        DCLLoss()(X, Y, logit_scale=torch.tensor(value))


def exact(beta: float, kappa: float, towers: int) -> float:
    """The objective where these six pairs are all there is, as a plain loop."""
    x, y, terms = F.normalize(X, dim=1), F.normalize(Y, dim=1), []
    for rows, columns in ((x, y), (y, x)):
        for i in range(6):
            negatives = [columns[j] for j in range(6) if j != i]
            negatives += [rows[j] for j in range(6) if j != i] if towers == 1 else []
            mass = sum(math.exp(beta * float(rows[i] @ z)) for z in negatives)
            positive = float(rows[i] @ columns[i])
            terms.append(math.log(mass + kappa * math.exp(beta * positive)) - beta * positive)
    return sum(terms) / len(terms)


WHOLE: dict[str, Callable[..., ContrastiveLoss]] = {  # exact where the batch is all there is
    "infonce": lambda **settings: InfoNCELoss(num_samples=6, **settings),
    "sogclr": lambda **settings: SogCLRLoss(6, gamma=1.0, **settings),
    "isir": lambda **settings: EMC2Loss(6, kernel="isir", **settings),
}


WHOLE_CASES = [("infonce", 1), ("infonce", 2), ("sogclr", 1), ("sogclr", 2), ("isir", 2)]


@pytest.mark.parametrize("kappa", [0.0, 0.4, 1.0, "global"])
@pytest.mark.parametrize(("name", "towers"), WHOLE_CASES)
def test_the_slope_in_beta_is_that_of_the_objective(name: str, towers: int, kappa: float | str) -> None:
    """By central differences; over all of the data "global" is 1."""
    beta, h, mass = 3.0, 1e-5, 1.0 if kappa == "global" else float(kappa)
    want = (exact(beta + h, mass, towers) - exact(beta - h, mass, towers)) / (2 * h)
    given = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    loss_fn, learnt = (
        WHOLE[name](positive_weight=kappa, towers=towers, temperature=each) for each in (0.5, Temperature(1 / beta))
    )
    for _ in range(2):
        (got,) = torch.autograd.grad(loss_fn(X, Y, INDEX, logit_scale=given), given)
        assert float(got) == pytest.approx(want, rel=1e-7)
        learnt.zero_grad()
        learnt(X, Y, INDEX).backward()
        assert float(learnt.temperature.logit_scale.grad) == pytest.approx(beta * want, rel=1e-6)


def test_the_temperature_that_is_learnt_is_the_objective_s_best() -> None:
    """Pairs that are alike, so that there is a best one; found on a grid."""
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = x + 1.5 * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    betas = torch.arange(0.05, 40, 0.01, dtype=torch.float64)
    target = torch.arange(6)
    values = [F.cross_entropy(beta * logits, target) + F.cross_entropy(beta * logits.T, target) for beta in betas]
    loss_fn = InfoNCELoss(Temperature(0.3), towers=2)
    optimiser = torch.optim.Adam(loss_fn.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss_fn(x, y).backward()
        optimiser.step()
    assert loss_fn.temperature().item() == pytest.approx(float(betas[torch.stack(values).argmin()]), abs=0.02)


def test_a_number_takes_the_place_of_what_was_learnt() -> None:
    loss_fn = DCLLoss(Temperature(0.25))
    loss_fn.temperature = 0.5
    assert not list(loss_fn.parameters())
    torch.testing.assert_close(loss_fn(X, Y), DCLLoss(0.5)(X, Y), rtol=0, atol=0)
    loss_fn.temperature = Temperature(0.25)
    assert len(list(loss_fn.parameters())) == 1
    torch.testing.assert_close(loss_fn(X, Y).detach(), DCLLoss(0.25)(X, Y))
    twin = copy.deepcopy(loss_fn)
    assert twin.temperature.logit_scale is not loss_fn.temperature.logit_scale


def test_two_temperatures_are_refused() -> None:
    x, y = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match="the loss learns a temperature of its own"):
        InfoNCELoss(Temperature(0.07))(x, y, logit_scale=torch.tensor(10.0))
    with pytest.raises(ValueError, match=r"logit_scale must be one positive number.*logit_scale.exp\(\)"):
        InfoNCELoss(0.07)(x, y, logit_scale=torch.tensor(-2.0))
