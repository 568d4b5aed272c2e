"""Damaged and foreign files of a run, and states that are none of this loss."""

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import TRIED, fuzz, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from torch_emc2 import EMC2Loss, NegativeCacheLoss, SogCLRLoss
from torch_emc2.cli import main
from torch_emc2.losses import ContrastiveLoss

FILES = ("config.yaml", "encoder.safetensors", "head.safetensors")


def damaged(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(min(len(content), draw.choice([8, 300, len(content)])))  # headers matter most
    match draw.randrange(4):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + draw.randbytes(3) + content[at + 3 :]
        case 2:
            return content[:at] + content[at + draw.randint(1, 99) :]
        case _:
            return draw.choice([b"", b"{}", b"\x80\x04.", b"PK\x03\x04", bytes(99), content + content[:at]])


@fuzz(60)
@given(data=st.data())
def test_embed_with_a_damaged_run(
    data: st.DataObject, finished: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    TRIED["damaged runs"] += 1
    draw = random.Random(data.draw(st.integers(0, 10**9)))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "photos").mkdir()
    Image.new("L", (8, 8)).save(folder / "photos" / "a.png")
    (folder / "run").mkdir()
    for name in FILES:
        shutil.copy(finished / name, folder / "run" / name)
    file = folder / "run" / draw.choice(FILES)
    file.write_bytes(damaged(draw, file.read_bytes()))
    status = main(["embed", str(folder / "run"), str(folder / "photos"), "-o", str(folder / "out.parquet")])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert status == 0 or (status, len(err.splitlines())) == (2, 1), err
    assert (folder / "out.parquet").exists() == (status == 0)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", FILES[1:])
def test_embed_with_foreign_weights(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TRIED["damaged runs"] += 1
    shutil.copytree(finished, tmp_path / "run")
    save_file({"weight": torch.zeros(3)}, tmp_path / "run" / name)
    assert main(["embed", str(tmp_path / "run"), str(tmp_path), "-o", str(tmp_path / "out.parquet")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line or str(tmp_path / "run") in line


MAKERS: list[Callable[[], ContrastiveLoss]] = [
    lambda: SogCLRLoss(9),
    lambda: NegativeCacheLoss(9, 4),
    lambda: EMC2Loss(9),
    lambda: EMC2Loss(9, carry="drop", num_chains=2),
    lambda: EMC2Loss(None),
]


@fuzz(150)
@given(st.data())
def test_foreign_states(data: st.DataObject) -> None:
    """A loss refuses a state that it cannot go on from, and is then as before."""
    saved, loaded = (data.draw(st.sampled_from(MAKERS))() for _ in range(2))
    for loss_fn in (saved, loaded):
        for seed in range(data.draw(st.integers(0, 2))):
            generator = torch.Generator().manual_seed(seed)
            loss_fn(*torch.randn(2, 5, 4, generator=generator), torch.randperm(9, generator=generator)[:5])
    state = copy.deepcopy(dict(saved.state_dict()))
    if data.draw(st.booleans()):
        extra: Any = state["_extra_state"]
        key = data.draw(st.sampled_from(sorted(extra)))
        value = data.draw(st.sampled_from([None, torch.zeros(0), torch.zeros(9), torch.zeros(9, 4), {}, "x", 1]))
        match data.draw(st.sampled_from(["drop", "change", "add"])):
            case "drop":
                del extra[key]
            case "change":
                extra[key] = value
            case "add":
                extra["more"] = value
    before = copy.deepcopy(loaded.state_dict())
    _, words = refusal("states", lambda: loaded.load_state_dict(state))
    if not words:
        return
    torch.testing.assert_close(loaded.state_dict(), before, rtol=0, atol=0)
