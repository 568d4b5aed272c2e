"""Whatever stands in a YAML file: a configuration, or a ValueError of one line; never code that runs."""

import copy
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import fuzz, refusal
from hypothesis import given
from hypothesis import strategies as st

from torch_emc2.cli import main
from torch_emc2.config import Config, presets, read_config

TEXTS = [file.read_text() for file in presets().values()]
TREES = [yaml.safe_load(text) for text in TEXTS]
JUNK = [
    None, True, -1, 0, 1e400, float("nan"), 10**30, "", "x", "null", "\0", "ü\n\t", "!!python/name:os.system", "*a",
    "&a", [], [[]], [1, "a", None], {}, {"a": {"b": {}}}, {"class_path": "os.system"},
    {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "hacked"]}}, {1: 2}, {None: 1},
    "/etc/passwd", "~", "${oc.env:HOME}", "2020-01-01",
]  # fmt: skip
TAGS = [
    "!!python/object/apply:os.system ['touch hacked']", "!!python/object/new:os.system ['touch hacked']",
    "!!python/name:os.system", "!!python/module:os", "!!python/tuple [1, 2]", "!!binary aGk=", "!!set {a, b}",
    "!!timestamp 2020-01-01", "!unknown x", "&a [*a]", "*b", "{<<: {seed: 1}}", "1_000", "0x10", "1:30", "? [a]",
    ".inf", "!!python/object/apply:subprocess.check_output [[touch, hacked]]", "|\n  block", "'unclosed", "[1, 2",
    "---\nseed: 1", "!!int x", "!!float []", "\u2028", "@", "`", "%YAML 3.0",
]  # fmt: skip


def read(part: str, text: str | bytes, folder: Path) -> Config | None:
    file = folder / "fuzzed.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    config, words = refusal(f"configs, {part}", lambda: read_config(str(file)))
    assert len(words.splitlines()) <= 1
    assert isinstance(config, Config) or words
    return config


def paths(tree: dict[str, Any]) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found.append((key,))
        found += [(key, *rest) for rest in paths(value)] if isinstance(value, dict) else []
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@fuzz(100)
@given(data=st.data())
def test_mutated_trees(data: st.DataObject, folder: Path) -> None:
    tree = yaml.safe_load(yaml.safe_dump(data.draw(st.sampled_from(TREES))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(paths(tree) or [("seed",)]))
        node = tree
        for key in at[:-1]:
            node = node[key]
        change = data.draw(st.sampled_from(["value", "unknown", "delete", "move"]))
        value = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
        match change:
            case "value":
                node[at[-1]] = value
            case "unknown":
                node[data.draw(st.sampled_from(["lss", "", "a.b", "__class__", "config", "class_path", "help"]))] = (
                    value
                )
            case "delete":
                node.pop(at[-1], None)
            case "move":
                tree[data.draw(st.sampled_from(["loss", "data", "model", "emc2"]))] = node.get(at[-1])
    read("mutated trees", yaml.safe_dump(tree), folder)
    assert not (folder / "hacked").exists()


@fuzz(100)
@given(data=st.data())
def test_mutated_text(data: st.DataObject, folder: Path) -> None:
    draw = random.Random(data.draw(st.integers(0, 10**9)))
    text = bytearray(draw.choice(TEXTS).encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text))
        match draw.randrange(3):
            case 0:
                text[at] = draw.choice([*b"\x00\t\n :-[]{}&*!|>'\"%@`#?,", draw.randrange(256)])
            case 1:
                del text[at : at + draw.randint(1, 30)]
            case 2:
                text[at:at] = draw.choice([draw.choice(TAGS).encode(), draw.randbytes(3), text[:at][-40:]])
    read("mutated text", bytes(text), folder)
    assert not (folder / "hacked").exists()


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("where", ["{}", "seed: {}", "data: {{name: {}}}", "data: {}", "loss: {}", "? {}\n: 1"])
def test_tags_run_no_code(where: str, tag: str, folder: Path) -> None:
    read("tags", where.format(tag), folder)
    assert not (folder / "hacked").exists()


CLASSES = [
    "data: {class_path: evil.X}", "model: evil.X", "data: {augmentation: {class_path: evil.X}}",
    "data.augmentation: evil.X",
    "data.augmentation.class_path: evil.X", "{data: {augmentation.class_path: evil.X}}",
    "emc2: '{class_path: evil.X}'",
    "<<: {optimizer: {class_path: evil.X, init_args: {}}}", "data: [evil.X]", "data: c.yaml",
    "loss: {class_path: evil.X}",
    "class_path: evil.X", "devices: {class_path: evil.X}", "model: &a {class_path: evil.X}", "sogclr: !!str evil.X",
]  # fmt: skip


@pytest.mark.parametrize("text", CLASSES)
def test_classes_are_not_imported(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "evil.py").write_text("open('hacked', 'w')\nclass X: pass\n")
    (folder / "c.yaml").write_text("class_path: evil.X")
    monkeypatch.syspath_prepend(folder)
    assert read("classes", text, folder) is None
    assert not (folder / "hacked").exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "{a: " * 5000, "- " * 5000, "seed: !!timestamp x", b"\xff\xfe", b"\x00" * 9, "a: &a [x]\nb: *a"],
)
def test_what_breaks_parsers(text: str | bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read("whole files", text, folder) is None
    assert main(["train", "fuzzed.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("emc2: error: ")
