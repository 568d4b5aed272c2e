"""Presets, files and overrides: what is read is what was written, and nothing else."""

import os
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from torch_emc2.config import Config, presets, read_config, to_yaml
from torch_emc2.settings.images import Augmentation


@pytest.mark.parametrize("name", presets())
def test_presets_go_through_yaml(name: str, tmp_path: Path) -> None:
    config = read_config(name)
    (tmp_path / "copy.yaml").write_text(to_yaml(config))
    assert read_config(str(tmp_path / "copy.yaml")) == config


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert read_config(str(tmp_path / "empty.yaml")) == Config()


def test_overrides_reach_every_depth() -> None:
    words = "--loss infonce --temperature 0.3 --data.augmentation.size 32 --emc2.num_chains 4 --optimizer.clip 1.5"
    config = read_config("quickstart", words.split())
    assert (config.loss, config.temperature, config.emc2.num_chains, config.optimizer.clip) == ("infonce", 0.3, 4, 1.5)
    assert config.data.augmentation.size == 32
    assert config.data.augmentation.crop_scale == (0.5, 1.0)  # the preset's


@pytest.mark.parametrize("kappa", [None, 0.0, 0.25, "global"])
def test_a_weight_of_the_positive_is_read_as_it_was_written(kappa: float | str | None, tmp_path: Path) -> None:
    config = replace(Config(), positive_weight=kappa)
    (tmp_path / "my.yaml").write_text(to_yaml(config))
    assert read_config(str(tmp_path / "my.yaml")) == config
    assert (
        read_config("quickstart", ["--positive_weight", "null" if kappa is None else str(kappa)]).positive_weight
        == kappa
    )


def test_the_papers_settings() -> None:
    stl10, imagenet = read_config("stl10-b32"), read_config("imagenet100")
    assert replace(stl10, batch_size=256, out="runs/stl10-b256") == read_config("stl10-b256")
    assert (stl10.batch_size, stl10.epochs, stl10.optimizer.warmup_epochs) == (32, 100, 10)
    assert 1 / stl10.temperature == pytest.approx(14.28, abs=0.01)
    assert (stl10.optimizer.name, stl10.optimizer.lr, stl10.optimizer.weight_decay) == ("adam", 1e-4, 1e-4)
    model = stl10.model
    assert (model.backbone, model.norm, model.hidden_dim, model.out_dim) == ("resnet18", "none", 512, 512)
    assert (model.feature, stl10.probe) == ("hidden", "sgd")
    assert stl10.emc2.burn_in is imagenet.emc2.burn_in is None  # one half
    assert imagenet.emc2.kernel == "metropolis"
    assert (stl10.sogclr.gamma, stl10.negative_cache.refresh_fraction) == (0.9, 0.01024)
    assert (stl10.emc2.num_chains, stl10.emc2.carry, stl10.emc2.kernel) == (1, "encode", "metropolis")
    crop, colours, blur = (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), (0.1, 2.0)
    assert stl10.data.augmentation == Augmentation(96, crop, 0.5, colours, 0.8, 0.2, 1.0, blur)
    assert (imagenet.batch_size, imagenet.epochs, imagenet.optimizer.warmup_epochs) == (256, 800, 10)
    own = imagenet.optimizer
    assert (own.name, own.lr, own.weight_decay, own.momentum) == ("lars", 1.2, 1e-6, 0.9)
    model = imagenet.model
    assert (model.backbone, model.norm, model.hidden_dim, model.hidden_layers) == ("resnet50", "none", 2048, 1)
    assert (model.out_dim, imagenet.probe) == (128, "sgd")
    assert imagenet.data.augmentation == Augmentation(224, crop, 0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 1.0, blur)
    assert imagenet.temperature == stl10.temperature


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lss: infonce", "lss"),
        ("emc2: {burnin: 0.2}", "burnin"),
        ("loss: simclr", "loss"),
        ("seed: many", "seed"),
        ("batch_size: 1", "batch_size must be at least 2, got 1"),
        ("epochs: 0", "epochs must be positive, got 0"),
        ("positive_weight: -0.5", "positive_weight must be at least 0 and finite, got -0.5"),
        ("positive_weight: .nan", "positive_weight must be finite, got nan"),
        ("positive_weight: local", "positive_weight"),
        ("positive_weight: true", "positive_weight"),
        ("data: {augmentation: {size: 28, flip: 2}}", "flip"),
        ("data: !!python/object/apply:os.system ['touch hacked']", "python"),
        ("data: [1, 2", "while parsing"),
        ("optimizer: {lr: fast}", r"optimizer\.lr"),
        ("optimizer: {lr: -1.0}", "lr must not be negative, got -1.0"),
        (
            "{epochs: 5, optimizer: {warmup_epochs: 10}}",
            r"optimizer\.warmup_epochs must not exceed epochs \(5\), got 10",
        ),
        ("optimizer: {clip: 0.0}", "clip must be positive, or null for none, got 0.0"),
        ("data: {num_workers: -2}", "num_workers must be from 0 to 1024, got -2"),
        ("seed: -1", r"seed must be at least 0 and below 2\*\*32, got -1"),
        ("model: {out_dim: 0}", "out_dim must be at least 1, got 0"),
        ("data: {finite_views: 1}", "finite_views must be at least 2, or null for none, got 1"),
        ("data: {shrink: 0.5}", "shrink must be from 2 to 1000, or null for images as they are, got 0.5"),
        (
            "data: {finite_views: 2, augment: device}",
            "finite_views are drawn before training: leave augment at workers",
        ),
        ("checkpoint_every_steps: 0", "checkpoint_every_steps must be positive, got 0"),
        ("devices: -1", "devices must be at least 1, or auto for all there are, got -1"),
        ("emc2:", "emc2 must be fields and their values, got null"),
        ("epochs: 10000000000", "epochs must be at most 4294967295, got 10000000000"),
        ("temperature: .inf", "temperature must be finite, got inf"),
    ],
)
def test_wrong_files_are_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_config("wrong.yaml")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--lss", "infonce"],
        ["--los", "infonce"],
        ["--loss", "simclr"],
        ["--data.limt", "3"],
        ["--epochs"],
        ["--emc2.num_chains", "two"],
    ],
)
def test_wrong_words_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0].strip("-")):
        read_config("quickstart", words)


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "evil.yaml"],
        ["--data.augmentation=evil_module.Class"],
        ["--data.augmentation.class_path", "evil_module.Class"],
        ["--optimizer", '{"class_path": "evil_module.Class"}'],
        ["--emc2", "evil_module.Class"],
    ],
)
def test_words_cannot_import_a_module(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("open('hacked', 'w')")
    (tmp_path / "evil.yaml").write_text("class_path: evil_module.Class")
    with pytest.raises(ValueError, match=r"must be a field of a group and its value, as --optimizer\.lr 0\.1"):
        read_config("quickstart", words)
    assert not (tmp_path / "hacked").exists()


def test_an_unknown_preset_is_named_with_the_known(tmp_path: Path) -> None:
    own = read_config("folder:my/pictures", ["--epochs", "3"])
    words = ["--data.name", "folder:my/pictures", "--epochs", "3", "--out", "runs/pictures"]
    assert own == read_config("photos", words)
    assert read_config("folder:my/pictures", ["--out", "x"]).out == "x"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"nor a YAML file; a run's is .*/run/config\.yaml$"):
        read_config(str(tmp_path / "run"))
    for field in ("--out", "--data.name"):
        with pytest.raises(ValueError, match=r"caf.*is not UTF-8, which config\.yaml must be"):
            read_config("photos", [field, os.fsdecode(b"folder:caf\xe9")])
    with pytest.raises(ValueError, match=r"'fashion' is neither a preset .*fashion-mnist.* nor a YAML file"):
        read_config("fashion")


def test_a_runs_config_names_the_folder_it_lies_in(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("out: somewhere")
    assert read_config(str(file)).out == "somewhere"  # any file of that name
    (tmp_path / "versions.json").write_text("{}")
    assert read_config(str(file)).out == str(tmp_path)
    assert read_config(str(file), ["--out", "other"]).out == "other"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("w.pth", "w.pth"), ("1.pth", "1.pth")])
def test_pretrained_is_a_switch_or_a_path(text: str, value: bool | str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"model: {{pretrained: {text}}}")
    assert read_config(str(file)).model.pretrained == value
    assert read_config("quickstart", ["--model.pretrained", text]).model.pretrained == value
    file.write_text(to_yaml(read_config(str(file))))
    assert read_config(str(file)).model.pretrained == value


def fields(kind: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, hint in get_type_hints(kind).items():
        yield from fields(hint, (*path, name)) if is_dataclass(hint) else [((*path, name), hint)]  # type: ignore[arg-type]


EXTREMES = {
    int: [-1, 1, 2**32 - 1, 10**30],
    float: [-1.0, 5e-324, 1.7e308, float("inf"), float("nan")],
    str: ["", "\0"],
    type(None): [None],
}


def extremes(hint: Any) -> list[Any]:
    if get_origin(hint) is tuple:
        return [[value] * len(get_args(hint)) for value in EXTREMES[get_args(hint)[0]]]
    if str(hint).startswith("typing.Literal"):
        return [*get_args(hint), "x", 3]
    return EXTREMES[hint] if hint in EXTREMES else [value for part in get_args(hint) for value in extremes(part)]


@pytest.mark.parametrize(("path", "hint"), [pytest.param(*field, id=".".join(field[0])) for field in fields(Config)])
def test_every_field_at_its_extremes_is_a_config_or_named(
    path: tuple[str, ...], hint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in [None, *extremes(hint)]:
        tree = yaml.safe_load(to_yaml(Config()))
        group = tree
        for name in path[:-1]:
            group = group[name]
        group[path[-1]] = value
        Path("my.yaml").write_text(yaml.safe_dump(tree))
        try:
            got: Any = read_config("my.yaml")
        except ValueError as error:
            (line,) = str(error).splitlines()
            assert path[-1] in line, value
            assert value is not None or "must not be null" in line
            continue
        for name in path:
            got = getattr(got, name)
        assert got == (tuple(value) if isinstance(value, list) else value)
        assert value is not None or type(None) in get_args(hint)


def bomb(line: str) -> str:
    """Nine levels of ten each."""
    lines = ["a: &a0 {seed: 1}"]
    lines += [f"a{i}: &a{i} {line}".replace("*", f"*a{i - 1}") for i in range(1, 10)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text", [bomb(f"[{', '.join('*' * 10)}]"), bomb(f"{{<<: [{', '.join('*' * 10)}]}}"), "&a [*a]"]
)
def test_nested_aliases_are_bounded(text: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"bomb\.yaml' has more than 10000 values, its aliases written out"):
        read_config(str(tmp_path / "bomb.yaml"))


def test_aliases_are_read(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("epochs: &n 7\nbatch_size: *n\noptimizer: {<<: {lr: 0.5}, momentum: 0.25}")
    config = read_config(str(tmp_path / "my.yaml"))
    assert (config.epochs, config.batch_size, config.optimizer.lr, config.optimizer.momentum) == (7, 7, 0.5, 0.25)


def test_home_is_written_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("{out: ~/a, data: {root: ~/b, name: 'folder:~/c', augmentation: {size: 8}}}")
    config = read_config("~/my.yaml")
    assert (config.out, config.data.root, config.data.name) == (
        f"{tmp_path}/a",
        f"{tmp_path}/b",
        f"folder:{tmp_path}/c",
    )
    assert read_config("~/my.yaml", ["--out=~/d"]).out == f"{tmp_path}/d"
    assert replace(config, out="~").out == str(tmp_path)
    assert replace(config, out="runs/a/").out == "runs/a"  # as a shell completes it
