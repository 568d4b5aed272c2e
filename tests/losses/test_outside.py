"""A loss of the user's own: imported where the user names it, and from no file."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torch_emc2.cli import main
from torch_emc2.config import Config, read_config, to_yaml
from torch_emc2.losses.registry import LossContext, find
from torch_emc2.runs import evaluate_run
from torch_emc2.training import build_loss, train

OWN = '''
from pathlib import Path
import torch
from torch_emc2 import ContrastiveLoss, SogCLRLoss
Path(__file__).with_name("imported").touch()
class Mine(SogCLRLoss):
    """DCL, with a memory that has to be resumed."""
    def __init__(self, num_samples, temperature):
        super().__init__(num_samples, temperature, gamma=0.5)
class Weighted(SogCLRLoss):
    def __init__(self, num_samples, temperature, positive_weight=0.75):
        super().__init__(num_samples, temperature, positive_weight=positive_weight)
class Other:
    pass
class Hollow(ContrastiveLoss):
    def __init__(self, num_samples, temperature):
        super().__init__(temperature)
class Wide(SogCLRLoss):
    def __init__(self, dim):
        super().__init__(9)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a module of losses, and the file that tells that it was imported."""
    (tmp_path / "own_package").mkdir()
    for name, text in (
        ("mine", OWN),
        ("broken", "1 / 0"),
        ("quits", "raise SystemExit(3)"),
        ("needs", "import nowhere"),
    ):
        (tmp_path / "own_package" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "own_package" / "imported"
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        del sys.modules[name]


def test_a_class_is_called_with_what_is_given(own: Path) -> None:
    row = find("own_package.mine:Mine")
    loss_fn = row.build(None, LossContext(9, 0.3, 4, seed=5))
    assert type(loss_fn) is row.loss is sys.modules["own_package.mine"].Mine
    assert (loss_fn.num_samples, loss_fn.temperature) == (9, 0.3)
    data = replace(Config().data, finite_views=2)
    loss_fn = build_loss(Config(loss="own_package.mine:Mine", temperature=0.2, data=data), 10)
    assert (loss_fn.num_samples, loss_fn.temperature) == (20, 0.2)


def test_a_class_is_given_a_weight_of_the_positive_where_the_run_has_one(own: Path) -> None:
    config = Config(loss="own_package.mine:Weighted")
    assert build_loss(config, 10).positive_weight == 0.75
    assert build_loss(replace(config, positive_weight=0.5), 10).positive_weight == 0.5
    with pytest.raises(
        ValueError, match=r"Mine must take \(num_samples=…, temperature=…, positive_weight=…\): .*positive_weight"
    ):
        build_loss(Config(loss="own_package.mine:Mine", positive_weight=0.5), 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_package.nothing:Mine", r"cannot be imported .*own_package\.nothing.*PYTHONPATH=FOLDER says where"),
        ("own_pakage:Mine", "cannot be imported .*own_pakage.*PYTHONPATH=FOLDER says where own_pakage is"),
        ("own_package.broken:Mine", r"cannot be imported \(ZeroDivisionError: division by zero\)$"),
        ("own_package.quits:Mine", r"cannot be imported \(SystemExit: 3\)$"),
        ("own_package.needs:Mine", r"cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)$"),
        ("own_package.mine:Nothing", r"own_package\.mine has no class Nothing derived from torch_emc2"),
        ("own_package.mine:Other", r"own_package\.mine has no class Other derived from torch_emc2"),
        ("own_package.mine:torch", r"own_package\.mine has no class torch derived from torch_emc2"),
        ("own_package.mine:Hollow", r"loss Hollow must take \(num_samples=…, temperature=…\): .*_weigh"),
        ("own_package.mine:Wide", r"loss Wide must take \(num_samples=…, temperature=…\): .*num_samples"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_written(
    name: str, message: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        find(name).build(None, LossContext(9, 0.3, 4))
    assert main(["quickstart", "--loss", name, "--out", str(tmp_path / "run"), "--accelerator", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("emc2: error: loss ")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_no_file_imports_a_class(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, name = tmp_path / "mine.yaml", "own_package.mine:Mine"
    file.write_text(f"loss: {name}")
    with pytest.raises(ValueError, match=rf"mine\.yaml' names the loss {name}, .*: give --loss {name} too"):
        read_config(str(file))
    assert main(["train", str(file), "--temperature", "0.2"]) == 2
    assert f"give --loss {name} too" in capsys.readouterr().err
    for words in (["--loss", name], [f"--loss={name}"], ["--loss", "dcl"]):
        assert read_config(str(file), words).loss == words[-1].removeprefix("--loss=")
    assert not own.exists()


def test_a_run_with_a_class_is_evaluated_and_goes_on(
    own: Path, tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "own_package.mine:Mine"
    config = replace(tiny, loss=name)
    whole = train(replace(config, out=str(tmp_path / "whole")))
    assert whole.joinpath("config.yaml").read_text() == to_yaml(replace(config, out=str(whole)))
    own.unlink()
    for module in ("own_package.mine", "own_package"):
        del sys.modules[module]
    assert evaluate_run(whole)[0].train_images == 1437
    assert not own.exists()  # its encoder is all that is needed

    run = train(replace(config, epochs=1))
    again = ["train", str(run / "config.yaml"), "--resume", "--epochs", "2"]
    own.unlink()
    for module in ("own_package.mine", "own_package"):
        del sys.modules[module]
    assert main(again) == 2
    assert f"give --loss {name} too" in capsys.readouterr().err
    assert not own.exists()
    assert main([*again, "--loss", "infonce"]) == 2
    line = capsys.readouterr().err
    assert f"loss: {name}, now infonce" in line
    assert f"emc2 train {run}/config.yaml --resume --loss {name} has it" in line
    assert main([*again, "--loss", name]) == 0
    averages = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["loss._extra_state"]
        for folder in (run, whole)
    ]
    visited = [(state["log_u"] > -torch.inf).sum() for state in averages]
    assert visited[0] == visited[1] > 0
