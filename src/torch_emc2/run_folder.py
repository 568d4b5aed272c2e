"""A run's folder: what a run writes down of itself, and what must be the same for it to go on."""

from __future__ import annotations

import contextlib
import csv
import json
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from torch_emc2.config import Config, read_config, to_yaml
from torch_emc2.files import load_checkpoint, one_line, whole_file

__all__ = ["find_checkpoint", "prepare_folder", "refuse_used", "resume_command", "validate_checkpoint"]

_PACKAGES = ("torch-emc2", "torch", "torchvision", "timm", "lightning", "scikit-learn", "numpy", "numba")


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


@rank_zero_only
def refuse_used(run: Path) -> None:
    """Raise FileExistsError where a run's folder would be among other files, or has a checkpoint."""
    names = {file.name for file in run.iterdir()} if run.exists() else set()
    if names - _BEFORE_A_CHECKPOINT or any(run.glob("checkpoints/*")):
        raise FileExistsError(f"{run} is not empty: --resume goes on with the run there, --out FOLDER starts another")


def find_checkpoint(run: Path) -> Path | None:
    """Return the last checkpoint; where it is gone, the newest of the others that are whole; None before the first.

    Raises:
        ValueError: there is none any more, and a start would write over what the run has come to.
    """
    folder = run / "checkpoints"
    last = folder / "last.ckpt"
    if last.exists():
        return last
    others = sorted(folder.glob("*.ckpt"))
    steps = {}
    for file in others:
        with contextlib.suppress(ValueError):  # damaged
            steps[file] = load_checkpoint(file)["global_step"]
    if steps:
        newest = max(steps, key=steps.__getitem__)
        rank_zero_only(print)(
            f"emc2: {last} is gone: going on from {newest.name}, step {steps[newest]}", file=sys.stderr
        )
        return newest
    if others or (run / "encoder.safetensors").exists() or _passed_a_checkpoint(run):
        raise ValueError(
            f"{run} has results but no whole checkpoint to go on from: put one into {folder}, "
            "or --out FOLDER starts another run"
        )
    return None


def prepare_folder(
    config: Config, run: Path, facts: dict[str, Any], *, resume: bool, checkpoint: Path | None = None
) -> None:
    """Write down what is run, and what else its results depend on; refuse to go on with a run that was another.

    A run may go on to more epochs. From its checkpoint on the learning rate is then that of a run of so many; the line
    that says so is kept in versions.json, and an encoder that was finished before under another name.
    """
    file, versions_file = run / "config.yaml", run / "versions.json"
    if resume and file.exists():
        before, saved = read_config(str(file)), _read_facts(versions_file)
        had, has = _what_counts(before, facts | saved), _what_counts(config, facts)
        longer = checkpoint is not None and config.epochs > before.epochs
        if different := [name for name in has if had.get(name) != has[name] and not (longer and name == "epochs")]:
            changes = "; ".join(f"{name}: {had.get(name)}, now {has[name]}" for name in different)
            advice = f"{resume_command(run)} has it"
            if "images" in different:
                advice = "put back the images that it began with, or start another run by --out FOLDER"
            raise ValueError(f"cannot resume {run}: its config differs ({changes}); {advice}")
        schedule = saved.get("schedule", [])
        if checkpoint is not None and longer:
            step = load_checkpoint(checkpoint)["global_step"]
            schedule = [*schedule, f"rates of {before.epochs} epochs up to step {step}, then those of {config.epochs}"]
            print(f"emc2: {run} goes on, with the {schedule[-1]}", file=sys.stderr)
            for part in ("encoder", "head"):
                if (trained := run / f"{part}.safetensors").exists():
                    trained.rename(run / f"{part}-{before.epochs}-epochs.safetensors")
        if schedule:
            facts = facts | {"schedule": schedule}
    versions = {"python": platform.python_version(), "platform": platform.platform(), **facts}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    for target, content in ((versions_file, json.dumps(versions, indent=2) + "\n"), (file, to_yaml(config))):
        with whole_file(target) as path:
            path.write_text(content)


def validate_checkpoint(file: Path, module: nn.Module) -> None:
    """Raise ValueError where a checkpoint cannot be read, or is one of another encoder."""
    saved, own = load_checkpoint(file)["state_dict"], module.state_dict()
    shapes = [{name: value.shape for name, value in state.items() if "encoder." in name} for state in (saved, own)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{file} is of another encoder: put this run's in its place, "
            "or remove it to go on from the newest that is left"
        )


def resume_command(run: Path) -> str:
    """Return the command that goes on with a run, for a shell."""
    return f"emc2 train {shlex.quote(str(run / 'config.yaml'))} --resume"


def _passed_a_checkpoint(run: Path) -> bool:
    """Tell whether metrics.csv has a step after the first that a checkpoint was written at."""
    metrics, config = run / "metrics.csv", run / "config.yaml"
    if not metrics.exists():
        return False
    every = read_config(str(config)).checkpoint_every_steps if config.exists() else None
    with metrics.open(newline="") as file:
        rows = [(row.get("step") or "", row.get("epoch") or "") for row in csv.DictReader(file)]
    return any(
        (epoch.isdecimal() and int(epoch) > 0) or (every is not None and step.isdecimal() and int(step) >= every)
        for step, epoch in rows
    )


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}): remove it") from error


def _what_counts(config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what a resumed run must share: all that its results depend on."""
    fields = _flat(yaml.safe_load(to_yaml(config)))
    for name in (
        "out",
        "probe",
        "accelerator",
        "devices",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "log_every_steps",
        "data.root",
        "data.num_workers",
        "data.on_bad_image",
    ):
        fields.pop(name)
    fields["batch_size on all devices"] = fields.pop("batch_size") * facts["processes"]
    if config.model.norm == "batch":  # its statistics are those of a process's part
        fields["processes"] = facts["processes"]
    return fields | {"images": facts["images"]}


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested fields as the command line does."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
