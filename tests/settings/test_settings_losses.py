"""What can be set of losses: what is refused, and what is a name."""

from collections.abc import Callable
from typing import Any

import pytest

from torch_emc2.settings.losses import (
    LOSSES,
    EMC2Config,
    NegativeCacheConfig,
    SogCLRConfig,
    UniformityConfig,
    is_outside,
    require_loss,
    require_positive_weight,
)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: EMC2Config(burn_in=1.0), "burn_in must be at least 0 and below 1, got 1.0"),
        (lambda: EMC2Config(burn_in=0.5, kernel="isir"), "burn_in must be null for the kernel isir"),
        (lambda: EMC2Config(num_chains=0), "num_chains must be at least 1, got 0"),
        (lambda: SogCLRConfig(gamma=0.0), "gamma must be above 0 and at most 1, got 0.0"),
        (lambda: UniformityConfig(gamma=1.5), "gamma must be above 0 and at most 1, got 1.5"),
        (lambda: NegativeCacheConfig(refresh_fraction=1.5), "refresh_fraction must be from 0 to 1, got 1.5"),
    ],
)
def test_wrong_settings_are_named(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_a_loss_is_one_of_ours_or_a_class_by_its_module() -> None:
    for name in (*LOSSES, "mine:Loss", "my_package.losses:Löss2"):
        require_loss(name)
        assert is_outside(name) == (":" in name)
    for name in ("simclr", "", "mine:", ":Loss", "mine.py:Loss()", "1st:Loss", "mine:a.b", "../mine:Loss", "a..b:C"):
        assert not is_outside(name)
        with pytest.raises(ValueError, match=r"loss must be one of infonce, dcl, .*, or a class of your own"):
            require_loss(name)


def test_a_weight_of_the_positive_is_a_number_or_that_of_all_data() -> None:
    assert require_positive_weight(1, (None,)) == 1.0
    assert require_positive_weight("global", (100,)) == "global"
    for wrong, error, named in (
        ("global", ValueError, "give num_samples"),
        (True, TypeError, "must be a number"),
        ("local", TypeError, "'local'"),
        (-0.5, ValueError, "got -0.5"),
        (float("inf"), ValueError, "got inf"),
    ):
        with pytest.raises(error, match=named):
            require_positive_weight(wrong, (None,))
