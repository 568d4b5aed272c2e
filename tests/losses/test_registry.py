"""The registry: a row for every estimator, with settings that a YAML file and a command line give and keep."""

import importlib
import inspect
import pkgutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

import torch_emc2
from torch_emc2 import losses
from torch_emc2.config import Config, read_config, to_yaml
from torch_emc2.experiments.definitions import methods as methods_by_title
from torch_emc2.kernels import Isir, Metropolis
from torch_emc2.losses import ContrastiveLoss
from torch_emc2.losses.registry import ESTIMATORS, LossContext, find, variants
from torch_emc2.losses.stateful import PerSampleLoss
from torch_emc2.settings.losses import LOSSES, EMC2Config, NegativeCacheConfig, SogCLRConfig
from torch_emc2.training import build_loss

ROWS = ESTIMATORS.values()


def concrete(module: Any) -> set[type]:
    kinds = {kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, ContrastiveLoss)}
    return {kind for kind in kinds if not inspect.isabstract(kind)}


def test_every_estimator_has_a_row_and_names_are_taken_once() -> None:
    modules = [
        importlib.import_module(f"torch_emc2.losses.{module.name}") for module in pkgutil.iter_modules(losses.__path__)
    ]
    own = {row.loss for row in ROWS}
    assert own == set.union(*(concrete(module) for module in modules))
    assert all(concrete(module) <= own for module in (losses, torch_emc2))
    assert list(ESTIMATORS) == list(LOSSES)
    methods = [method for row in ROWS for method in row.methods]
    assert all(row.methods for row in ROWS)
    for names in (
        [row.loss for row in ROWS],
        [method.title for method in methods],
        [method.colour for method in methods],
        [method.marker for method in methods],
        [*(field.name for field in fields(Config)), *(row.group for row in ROWS if row.settings is None)],
    ):
        assert len(set(names)) == len(names)
    assert list(methods_by_title()) == [method.title for method in methods]


def test_a_row_builds_its_loss_for_what_is_given() -> None:
    for row in ROWS:
        for some in [*row.variants.values(), *(method.fields for method in row.methods)]:
            make = row.maker(some, LossContext(9, 0.3, 4))
            first, second = make(5), make(6)
            assert (type(first), first.temperature) == (row.loss, 0.3)
            assert (getattr(first, "seed", 5), getattr(second, "seed", 6)) == (5, 6)
    by_title: dict[str, Any] = {
        title: make(0)
        for title, make in variants(
            LossContext(9, 0.3, 4, 3), {"emc2": EMC2Config(burn_in=0.25, kernel="metropolis")}
        ).items()
    }
    assert len(by_title) == sum(len(row.variants) for row in ROWS)
    chains = by_title["EMC², cache"]
    assert (chains.num_samples, chains.num_chains, chains.carry) == (9, 1, "cache")
    assert chains.kernel == Metropolis(burn_in=0.25)  # of the settings, where the variant has none
    assert by_title["EMC², encode, 4 chains"].num_chains == 4
    assert by_title["EMC², isir"].kernel == Isir()
    assert by_title["SogCLR, γ = 0.1"].gamma == 0.1
    cache = by_title["Negative Cache"]
    assert (cache.num_samples, cache.views_per_sample, cache.refresh_fraction) == (9, 3, 0.01024)


def another(hint: Any, value: Any) -> Any:
    """Give another value of a setting."""
    if isinstance(value, str):
        return next(word for word in get_args(hint) if word != value)
    return value + 2 if isinstance(value, int) else (value or 0.5) / 2


SETTINGS = [(row.name, each.name) for row in ROWS if row.settings is not None for each in fields(row.settings)]


@pytest.mark.parametrize(("name", "field"), SETTINGS)
def test_a_setting_goes_through_a_file_and_the_command_line_into_the_loss(
    name: str, field: str, tmp_path: Path
) -> None:
    row = ESTIMATORS[name]
    assert row.settings is not None
    value = another(get_type_hints(row.settings)[field], getattr(row.settings(), field))
    given = {field: value} | ({"kernel": "metropolis"} if field == "burn_in" else {})  # which alone has one
    own = row.settings(**given)
    config = replace(Config(loss=name), **{row.group: own})
    assert config != Config(loss=name)
    for file, tree in (("whole", yaml.safe_load(to_yaml(config))), ("part", {"loss": name, row.group: given})):
        (tmp_path / file).write_text(yaml.safe_dump(tree))
        assert read_config(str(tmp_path / file)) == config
    words = [word for name, value in given.items() for word in (f"--{row.group}.{name}", str(value))]
    assert getattr(read_config("quickstart", words), row.group) == own
    if field != "decay":  # of the momentum encoder, which is the training step's
        assert build_loss(config, 9)._alike("cpu") != build_loss(Config(loss=name), 9)._alike("cpu")


def test_what_settings_refuse_the_loss_refuses_too() -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("emc2", {"burn_in": 1.0}),
        ("emc2", {"burn_in": 0.5, "kernel": "isir"}),
        ("emc2", {"num_chains": 0}),
        ("momentum", {"queue_size": -1}),
        ("uniformity", {"gamma": 0.0}),
        ("sogclr", {"gamma": 0.0}),
        ("negative-cache", {"refresh_fraction": 1.1}),
    ]
    for name, changes in bad:
        row = ESTIMATORS[name]
        assert row.settings is not None
        with pytest.raises(ValueError, match=next(iter(changes))):
            row.settings(**changes)
        own = row.settings()
        vars(own).update(changes)
        with pytest.raises(ValueError, match=next(iter(changes))):
            row.build(own, LossContext(9, 0.1, 4))


def test_finite_views_have_an_entry_each() -> None:
    data = replace(Config().data, finite_views=3)
    for row in ROWS:
        loss_fn = build_loss(Config(loss=row.name, data=data, temperature=0.2), 10)
        assert loss_fn.num_samples == (30 if issubclass(row.loss, PerSampleLoss) else None)
        assert (getattr(loss_fn, "views_per_sample", 3), loss_fn.temperature) == (3, 0.2)


OWN_WEIGHTS = {"infonce": 1.0, "negative-cache": "global"}  # and 0 the others


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_run_s_weight_of_the_positive_is_its_loss_s(name: str) -> None:
    assert build_loss(Config(loss=name), 9).positive_weight == OWN_WEIGHTS.get(name, 0.0)
    for kappa in (0.0, 0.25, "global"):
        loss_fn = build_loss(Config(loss=name, positive_weight=kappa), 9)
        assert loss_fn.positive_weight == kappa
        assert loss_fn.num_samples == (9 if kappa == "global" or isinstance(loss_fn, PerSampleLoss) else None)
    weights = {make(0).positive_weight for make in variants(LossContext(9, 0.3, 4, positive_weight=0.25)).values()}
    assert weights == {0.25}


# As a run of version 0.1.0 has written it.
WRITTEN = """\
loss: sogclr
temperature: 0.1
emc2:
  burn_in: 0.1
  num_chains: 2
  carry: cache
  kernel: metropolis
sogclr:
  gamma: 0.8
negative_cache:
  refresh_fraction: 0.5
seed: 3
"""


def test_files_of_before_are_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(WRITTEN)
    config = read_config(str(tmp_path / "config.yaml"))
    expected = Config(
        loss="sogclr",
        temperature=0.1,
        emc2=EMC2Config(0.1, 2, "cache", "metropolis"),
        sogclr=SogCLRConfig(0.8),
        negative_cache=NegativeCacheConfig(0.5),
        seed=3,
    )
    assert config == expected
    assert config.positive_weight is None
    assert list(yaml.safe_load(to_yaml(config)))[:4] == ["data", "model", "loss", "temperature"]


def test_a_name_that_is_none_is_told_the_names() -> None:
    for name in ("simclr", "", "EMC2", "a.b", "a:b:c", "a:", ":b", "a b:c", "a/b:c", ".a:b"):
        with pytest.raises(ValueError, match=r"loss must be one of infonce, .*emc2, or a class of your own .*, got '"):
            find(name)


def test_losses_that_remember_an_entry_a_sample_need_its_id() -> None:
    assert {row.name for row in ROWS if row.loss.needs_index} == {"emc2", "sogclr", "negative-cache"}
