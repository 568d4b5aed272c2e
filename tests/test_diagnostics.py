"""The measure of errors against cases whose error is known; and the claim the library stands for."""

from collections.abc import Callable

import pytest
import torch

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, SogCLRLoss
from torch_emc2.diagnostics import clustered_embeddings, gradient_error
from torch_emc2.exact import global_contrastive_loss
from torch_emc2.losses import ContrastiveLoss


def test_dcl_on_the_whole_data_set_has_no_error() -> None:
    error = gradient_error(
        lambda _: DCLLoss(0.07), clustered_embeddings(40).double(), 40, epochs=2, mixing_epochs=0, runs=2
    )
    assert error.one_epoch < 1e-20
    assert abs(error.squared_bias) < 1e-20


def test_infonce_on_the_whole_data_set_errs_by_the_positive_in_its_denominator() -> None:
    z = clustered_embeddings(40).double()
    error = gradient_error(lambda _: InfoNCELoss(0.07), z, 40, epochs=2, mixing_epochs=0, runs=2)
    z.requires_grad_()
    (exact,) = torch.autograd.grad(global_contrastive_loss(z, 0.07), z)
    (with_positive,) = torch.autograd.grad(global_contrastive_loss(z, 0.07, include_positive=True), z)
    expected = float((with_positive - exact).square().sum() / exact.square().sum())
    assert error.squared_bias == pytest.approx(expected, rel=1e-9)
    assert error.one_epoch == pytest.approx(expected, rel=1e-9)


def test_squared_bias_is_free_of_variance() -> None:
    # Exact weights on half of the data set at a time: each batch errs, their mean over epochs hardly does at this β.
    z = clustered_embeddings(40)
    error = gradient_error(lambda _: DCLLoss(5.0), z, 20, epochs=200, mixing_epochs=0, runs=3)
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
    bias = {name: gradient_error(make, z, 32, epochs=30, runs=2).squared_bias for name, make in makers.items()}
    assert bias["emc2"] < bias["dcl"] / 3
    assert bias["emc2"] < bias["sogclr"] / 3
    assert bias["emc2"] < bias["drop"] / 3
