"""A run's folder: what a run writes down of itself, and what can be told from that."""

from __future__ import annotations

import contextlib
import csv
import json
import platform
import re
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch_emc2.checkpoint import load_checkpoint
from torch_emc2.config import Config, recorded_config, to_yaml
from torch_emc2.error_text import one_line
from torch_emc2.files import whole_file
from torch_emc2.names import did_you_mean
from torch_emc2.settings.losses import is_outside

__all__ = [
    "evaluations",
    "finished_epochs",
    "has_results",
    "is_finished",
    "keep_finished",
    "prepare_folder",
    "read_facts",
    "refuse_used",
    "require_finished",
    "resume_command",
]

_PACKAGES = ("torch-emc2", "torch", "torchvision", "timm", "lightning", "scikit-learn", "numpy", "numba", "triton")

_OF_AN_ENCODER = (
    *("encoder.safetensors", "head.safetensors", "evaluation.json", "neighbours.png", "curves.png", "map.png"),
    *("diagnosis.json", "diagnosis.md", "diagnosis.png"),
)

# What a run that was stopped before its first checkpoint may have left.
_BEFORE_A_CHECKPOINT = {
    ".lock",
    "checked.json",
    "checkpoints",
    "config.yaml",
    "metrics.csv",
    "tensorboard",
    "unreadable.json",
    "versions.json",
}


def prepare_folder(config: Config, run: Path, facts: dict[str, Any], checkpoint: Path | None) -> None:
    """Write down what is run, and what else its results depend on; what another start has logged goes.

    Where a run goes on to other epochs, the learning rate is from its checkpoint on that of a run of so many; the line
    that says so is kept in versions.json.
    """
    if checkpoint is None:
        _clear_logs(run)
    elif (run / "config.yaml").exists():
        facts = facts | _history(config, run, checkpoint)
    _write_facts(run, {"python": platform.python_version(), "platform": platform.platform(), **facts, **_versions()})
    with whole_file(run / "config.yaml") as file:
        file.write_text(to_yaml(config))


def _clear_logs(run: Path) -> None:
    (run / "metrics.csv").unlink(missing_ok=True)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)


def _history(config: Config, run: Path, checkpoint: Path) -> dict[str, Any]:
    """Return what stays true of a run that goes on: at which steps its rates changed, and which encoder is finished."""
    before, saved = recorded_config(run), read_facts(run)
    schedule = saved.get("schedule", [])
    if config.epochs != before.epochs:
        step = load_checkpoint(checkpoint)["global_step"]
        schedule = [*schedule, f"rates of {before.epochs} epochs up to step {step}, then those of {config.epochs}"]
        print(f"emc2: {run} goes on, with the {schedule[-1]}", file=sys.stderr)
    history = {"schedule": schedule, "finished": finished_epochs(run)}
    return {name: value for name, value in history.items() if value}


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def keep_finished(run: Path, epochs: int) -> None:
    """Make way for the encoder of so many epochs: one that was finished after fewer is kept under their number.

    So is what was measured and drawn of it, which would pass for the new one's.
    """
    saved = read_facts(run)
    if (finished := saved.get("finished", epochs)) != epochs:
        others = [file.name for file in evaluations(run) if file.name != "evaluation.json"]
        theirs = [f"neighbours{name.removeprefix('evaluation').removesuffix('.json')}.png" for name in others]
        for file in (run / name for name in (*_OF_AN_ENCODER, *others, *theirs)):
            if file.is_file():
                file.rename(file.with_stem(f"{file.stem}-{finished}-epochs"))
    _write_facts(run, saved | {"finished": epochs})


def evaluations(run: Path) -> list[Path]:
    """Return the files with what was measured of a run's encoder, and not of those that it had after fewer epochs."""
    return sorted(file for file in run.glob("evaluation*.json") if not re.search(r"-\d+-epochs$", file.stem))


def is_finished(run: Path) -> bool:
    """Tell whether a run has written its encoder and head, of which the head comes last."""
    return (run / "head.safetensors").is_file()


def require_finished(run: Path) -> None:
    """Raise ValueError where a folder is not that of a run that has come to its end."""
    if not run.exists():
        runs = [str(file.parent) for file in sorted(run.parent.glob("*/config.yaml"))]
        raise ValueError(f"there is no run {str(run)!r}{did_you_mean(str(run), runs)}")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{str(run)!r} is not a run's folder: it has no config.yaml")
    if not is_finished(run):
        raise ValueError(f"the run in {str(run)!r} is not finished: {resume_command(run)} goes on")


def finished_epochs(run: Path) -> int:
    """Return the epochs of the encoder that a run has finished; 0 before it has."""
    return int(read_facts(run).get("finished", 0))


def refuse_used(run: Path) -> None:
    """Raise FileExistsError where a run's folder would be among other files, or has a checkpoint."""
    names = {file.name for file in run.iterdir()} if run.exists() else set()
    names -= {name for name in names if name.startswith(".") and name.endswith(".partial")}  # of killed writers
    if names - _BEFORE_A_CHECKPOINT or has_results(run):
        raise FileExistsError(f"{run} is not empty: --resume goes on with the run there, --out FOLDER starts another")


def has_results(run: Path) -> bool:
    """Tell whether a run has what another start would write over: a checkpoint, an encoder, or rows from after one."""
    checkpoints = any(run.glob("checkpoints/[!.]*"))
    return checkpoints or (run / "encoder.safetensors").exists() or _passed_a_checkpoint(run)


def _passed_a_checkpoint(run: Path) -> bool:
    """Tell whether metrics.csv has a step after the first that a checkpoint was written at."""
    metrics, config = run / "metrics.csv", run / "config.yaml"
    if not metrics.exists():
        return False
    every = recorded_config(run).checkpoint_every_steps if config.exists() else None
    with metrics.open(newline="") as file:
        rows = [(row.get("step") or "", row.get("epoch") or "") for row in csv.DictReader(file)]
    return any(
        (epoch.isdecimal() and int(epoch) > 0) or (every is not None and step.isdecimal() and int(step) >= every)
        for step, epoch in rows
    )


def resume_command(run: Path) -> str:
    """Return the command that goes on with a run, for a shell."""
    file = run / "config.yaml"
    loss = recorded_config(run).loss if file.exists() else ""
    return f"emc2 train {shlex.quote(str(file))} --resume" + (f" --loss {loss}" if is_outside(loss) else "")


def read_facts(run: Path) -> dict[str, Any]:
    """Read a run's versions.json, {} before it is there: versions, processes, which images, where, in which range.

    Raises:
        ValueError: it is damaged.
    """
    file = run / "versions.json"
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}): remove it") from error


def _write_facts(run: Path, facts: dict[str, Any]) -> None:
    with whole_file(run / "versions.json") as file:
        file.write_text(json.dumps(facts, indent=2) + "\n")
