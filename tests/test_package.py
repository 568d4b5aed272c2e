"""What a user meets first: the import, the README's code, the examples in docstrings, the files in the wheel."""

import ast
import doctest
import importlib
import math
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import torch_emc2

ROOT = Path(__file__).parent.parent


def test_import_needs_torch_alone() -> None:
    code = """
import sys
absent = ("numba", "torchvision", "timm", "lightning", "sklearn", "jsonargparse", "matplotlib", "PIL")
sys.modules.update(dict.fromkeys(absent))  # to who looks for them, too, as torch's compiler does
import torch_emc2
assert "torch" not in sys.modules  # nor does the import alone
import torch
before = {*sys.modules}
for name in torch_emc2.__all__:
    getattr(torch_emc2, name)
added = {name.partition(".")[0] for name in {*sys.modules} - before}
assert added - sys.stdlib_module_names == {"torch_emc2"}, added  # nor more of torch: its compiler takes seconds
z1, z2 = torch.randn(2, 8, 4).unbind()
with_scan = torch_emc2.EMC2Loss(8, kernel="metropolis")
for _ in range(3):
    with_scan(z1, z2, torch.arange(8))
from torch_emc2.kernels.counted import compiled_kernels
assert compiled_kernels("cpu") is None
assert (with_scan.chains.ids.data >= 0).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("file", sorted((ROOT / "src/torch_emc2/settings").glob("*.py")), ids=lambda file: file.name)
def test_settings_import_nothing_of_the_package_nor_torch(file: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("torch_emc2" if node.level else str(node.module).partition(".")[0])
    assert names - sys.stdlib_module_names <= {"PIL"}


def test_names_are_those_of_where_they_are_made() -> None:
    assert torch_emc2.EMC2Loss is importlib.import_module("torch_emc2.losses.emc2").EMC2Loss
    assert torch_emc2.metropolis is importlib.import_module("torch_emc2.kernels.metropolis")
    assert torch_emc2.exact is importlib.import_module("torch_emc2.exact")
    assert {*torch_emc2.__all__, "__version__"} <= {*dir(torch_emc2)}
    with pytest.raises(AttributeError, match="module 'torch_emc2' has no attribute 'InfoNCE'"):
        torch_emc2.InfoNCE  # type: ignore[attr-defined]  # noqa: B018


def run_page(page: str) -> dict[str, object]:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(block, names)
    return names


def test_readme_code_runs() -> None:
    names = run_page("README.md")
    slope = next(iter(names["two_tower_loss"].parameters()))  # type: ignore[attr-defined]
    assert slope.item() != pytest.approx(-math.log(0.07), abs=1e-3)  # it was learnt
    two_towers: Any = names["two_tower_loss"]
    assert [int((side.chains.ids.data >= 0).sum()) for side in two_towers.sides] == [1000, 1000]  # all were visited
    assert cast(Any, names["momentum_loss"]).last["slow_similarity"] > 0.9
    assert cast(Any, names["loss"]).isfinite()


def test_the_code_of_the_page_on_two_towers_runs() -> None:
    names = run_page("docs/two-towers.md")
    assert names["loss_fn"].sides[0].chains.ids.data[:8].ge(0).all()  # type: ignore[attr-defined]
    assert names["slope"].isfinite()  # type: ignore[attr-defined]


def test_the_estimator_of_its_page_is_infonce_with_a_margin() -> None:
    """Against cross entropy, value and gradient."""
    make: Any = run_page("docs/own-estimator.md")["MarginLoss"]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(12, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    unit = torch.nn.functional.normalize(z, dim=1)
    logits = (unit @ unit.T / 0.2).fill_diagonal_(-math.inf)
    positive = torch.arange(12).roll(6)
    logits = logits - torch.nn.functional.one_hot(positive, 12) * (0.3 / 0.2)
    want = torch.nn.functional.cross_entropy(logits, positive)
    got = make(0.2, 0.3)(z[:6], z[6:])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z) for loss in (got, want)))
    two = make(0.2, 0.3, towers=2)(z[:6], z[6:])
    matrix = unit[:6] @ unit[6:].T / 0.2 - torch.eye(6) * (0.3 / 0.2)
    both = [torch.nn.functional.cross_entropy(each, torch.arange(6)) for each in (matrix, matrix.T)]
    torch.testing.assert_close(two, sum(both) / 2)


def pages_with_code() -> list[str]:
    own = {"README.md", "docs/two-towers.md", "docs/own-estimator.md"}
    pages = {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md") if "```python" in page.read_text()}
    return sorted(pages - own)


@pytest.mark.parametrize("page", pages_with_code())
def test_the_code_of_a_page_runs(page: str) -> None:
    run_page(page)


@pytest.mark.parametrize("module", ["kernels.metropolis", "losses.in_batch", "losses.emc2", "temperature"])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(
        importlib.import_module(f"torch_emc2.{module}"), extraglobs={"torch": torch, "torch_emc2": torch_emc2}
    )
    assert result.attempted > 0
    assert result.failed == 0


def test_package_carries_its_data() -> None:
    root = files("torch_emc2")
    assert root.joinpath("py.typed").is_file()
    assert len(root.joinpath("data/imagenet100_wnids.txt").read_text().split()) == 100
    names = {entry.name for entry in root.joinpath("experiments/presets").iterdir()}
    assert {
        f"{name}.yaml" for name in ("quickstart", "fashion-mnist", "stl10-b32", "stl10-b256", "imagenet100", "cifar10")
    } <= names
