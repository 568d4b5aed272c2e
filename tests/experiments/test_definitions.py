"""The experiments' settings: those of the paper where it has them, and alike for every method."""

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest

from torch_emc2.data import DataError
from torch_emc2.experiments.definitions import EXPERIMENTS, SCALES, base_config, methods, override
from torch_emc2.kernels import Metropolis
from torch_emc2.training import build_loss


def test_a_field_is_replaced_where_it_is_nested() -> None:
    base = base_config("digits", "smoke", [])
    changed = override(base, {"optimizer.lr": 0.5, "emc2.num_chains": 9, "temperature": 3.0})
    expected = replace(
        base, temperature=3.0, optimizer=replace(base.optimizer, lr=0.5), emc2=replace(base.emc2, num_chains=9)
    )
    assert changed == expected
    assert base.temperature == 0.1


def test_the_users_overrides_come_last() -> None:
    config = base_config("digits", "smoke", ["--epochs", "3", "--model.out_dim", "8"])
    assert (config.epochs, config.model.out_dim, config.data.limit) == (3, 8, 256)
    with pytest.raises(ValueError, match="nonsense"):
        base_config("digits", "smoke", ["--nonsense", "3"])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dataset", ["digits", "fashion-mnist", "cifar10", "stl10", "imagenet100", "folder:photos"])
def test_every_experiment_takes_every_data_set(dataset: str, scale: str) -> None:
    base = base_config(dataset, scale, [])
    assert base.data.name == dataset
    for name, experiment in EXPERIMENTS.items():
        try:
            variants = list(experiment.variants(base, {}))
        except DataError:
            assert name == "pre-augmented"  # its sizes are those of the images that are there
            continue
        places = Counter((variant.series, variant.x) for variant in variants)
        assert max(places.values()) == 1, f"{name}: a place of the figure is taken twice"
        configs = [str(asdict(variant.config)) for variant in variants]
        assert len(set(configs)) == len(configs), f"{name}: the same run under two names"


def test_settings_of_the_paper() -> None:
    base = base_config("stl10", "full", [])
    names = ("burn-in", "small-batch", "large-batch", "gradient-study")
    variants = {name: list(EXPERIMENTS[name].variants(base, {})) for name in names}
    assert [variant.x for variant in variants["burn-in"]] == [0.0, 0.25, 0.5, 0.75, 0.9]
    assert {variant.config.batch_size for variant in variants["small-batch"]} == {32}
    assert {variant.config.batch_size for variant in variants["large-batch"]} == {256}
    for _, _, config in variants["gradient-study"]:
        assert (config.data.limit, config.data.finite_views, config.model.norm) == (500, 2, "none")
        assert (config.optimizer.name, config.optimizer.lr, config.batch_size) == ("sgd", 1e-3, 4)
        assert config.epochs * 500 // config.batch_size == 1250  # steps
        assert 1 / config.temperature == pytest.approx(5)
    for _, _, config in variants["small-batch"]:
        assert (config.optimizer.lr, config.epochs) == (1e-4, 100)
        assert 1 / config.temperature == pytest.approx(14.28, abs=0.01)
    (emc2,) = [config for series, _, config in variants["small-batch"] if series == "EMC²"]
    assert build_loss(emc2, 100).kernel == Metropolis(burn_in=0.5)


def test_sizes_are_those_of_the_images_and_compared_at_equal_samples() -> None:
    base = base_config("digits", "full", [])
    variants = list(EXPERIMENTS["pre-augmented"].variants(base, {}))
    assert {variant.x for variant in variants} == {1437 // 4, 1437 // 2, 1437}
    for _, size, config in variants:
        assert (config.data.limit, config.epochs) == (size, 1437 // size * base.epochs)
        assert config.optimizer.warmup_epochs / config.epochs == base.optimizer.warmup_epochs / base.epochs


def test_every_method_is_searched_alike() -> None:
    base = base_config("fashion-mnist", "small", [])
    tried: dict[str, set[tuple[float, float]]] = {name: set() for name in methods()}
    for series, _, config in EXPERIMENTS["search"].variants(base, {}):
        tried[series].add((config.optimizer.lr, config.temperature))
    assert set.union(*tried.values()) == {(1e-3, heat) for heat in (0.05, 0.1, 0.2)} | {
        (rate, 0.1) for rate in (3.3e-4, 3e-3, 1e-2)
    }
    assert all(settings == tried["InfoNCE"] for settings in tried.values())


def test_what_a_search_chose_is_used() -> None:
    base = base_config("digits", "smoke", [])
    tuned = {"DCL": {"optimizer.lr": 0.7, "temperature": 0.3}}
    for series, _, config in EXPERIMENTS["batch-size"].variants(base, tuned):
        expected = (0.7, 0.3) if series == "DCL" else (base.optimizer.lr, base.temperature)
        assert (config.optimizer.lr, config.temperature) == expected


def test_a_method_is_its_own_whatever_the_base_or_a_search_has() -> None:
    base = base_config("digits", "smoke", ["--emc2.kernel", "metropolis", "--emc2.burn_in", "0.3"])
    tuned: dict[str, dict[str, Any]] = {name: {"temperature": 0.3, "loss": "own_module:Class"} for name in methods()}
    configs = {series: config for series, _, config in EXPERIMENTS["small-batch"].variants(base, tuned)}
    assert [config.loss for config in configs.values()] == [methods()[name]["loss"] for name in configs]
    assert {config.temperature for config in configs.values()} == {0.3}
    own = {name: (config.emc2.kernel, config.emc2.burn_in) for name, config in configs.items() if "EMC" in name}
    assert own == {"EMC²": ("metropolis", 0.3), "EMC², isir": ("isir", None)}
