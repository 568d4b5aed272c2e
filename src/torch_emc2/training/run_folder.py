"""A run's folder: what a run writes down of itself, and what must be the same for it to go on."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import platform
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from torch_emc2.config import Config, read_config, to_yaml
from torch_emc2.files import load_checkpoint, one_line, whole_file

__all__ = [
    "find_checkpoint",
    "keep_finished",
    "prepare_folder",
    "refuse_another",
    "refuse_used",
    "resume_command",
    "validate_checkpoint",
]

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
    names -= {name for name in names if name.startswith(".") and name.endswith(".partial")}  # of killed writers
    if names - _BEFORE_A_CHECKPOINT or any(run.glob("checkpoints/[!.]*")) or _passed_a_checkpoint(run):
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


def refuse_another(config: Config, run: Path, facts: dict[str, Any], checkpoint: Path | None) -> None:
    """Refuse to go on with a run that was another.

    From a checkpoint on its epochs may be others, no fewer than have begun, nor than those of a finished encoder.

    Raises:
        ValueError: it was; the message has what differs.
    """
    file = run / "config.yaml"
    if not file.exists():
        return
    before, saved = read_config(str(file)), _read_facts(run / "versions.json")
    had, has = _what_counts(before, facts | saved), _what_counts(config, facts)
    if checkpoint is not None:
        fewest = max(load_checkpoint(checkpoint)["epoch"] + 1, _finished_epochs(run, before, saved))
        if config.epochs >= fewest:
            had["epochs"] = config.epochs
    if different := [name for name in has if had.get(name) != has[name]]:
        changes = "; ".join(f"{name}: {had.get(name)}, now {has[name]}" for name in different)
        advice = f"{resume_command(run)} has it"
        if "images" in different:
            advice = "put back the images that it began with, or start another run by --out FOLDER"
        raise ValueError(f"cannot resume {run}: its config differs ({changes}); {advice}")


def prepare_folder(config: Config, run: Path, facts: dict[str, Any], checkpoint: Path | None) -> None:
    """Write down what is run, and what else its results depend on; what another start has logged goes.

    Where a run goes on to other epochs, the learning rate is from its checkpoint on that of a run of so many; the line
    that says so is kept in versions.json.
    """
    file, versions_file = run / "config.yaml", run / "versions.json"
    if checkpoint is None:
        (run / "metrics.csv").unlink(missing_ok=True)
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
    elif file.exists():
        before, saved = read_config(str(file)), _read_facts(versions_file)
        schedule = saved.get("schedule", [])
        if config.epochs != before.epochs:
            step = load_checkpoint(checkpoint)["global_step"]
            schedule = [*schedule, f"rates of {before.epochs} epochs up to step {step}, then those of {config.epochs}"]
            print(f"emc2: {run} goes on, with the {schedule[-1]}", file=sys.stderr)
        if schedule:
            facts = facts | {"schedule": schedule}
        if finished := _finished_epochs(run, before, saved):
            facts = facts | {"finished": finished}
    versions = {"python": platform.python_version(), "platform": platform.platform(), **facts}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    _write(versions_file, _to_json(versions))
    _write(file, to_yaml(config))


def keep_finished(run: Path, epochs: int) -> None:
    """Make way for the encoder of so many epochs: one that was finished after fewer is kept under their number."""
    saved = _read_facts(run / "versions.json")
    if (finished := saved.get("finished", epochs)) != epochs:
        for part in ("encoder", "head"):
            if (trained := run / f"{part}.safetensors").exists():
                trained.rename(run / f"{part}-{finished}-epochs.safetensors")
    _write(run / "versions.json", _to_json(saved | {"finished": epochs}))


def validate_checkpoint(file: Path, module: nn.Module) -> None:
    """Raise ValueError where a checkpoint cannot be read, or is one of another encoder or loss."""
    saved, own = load_checkpoint(file)["state_dict"], module.state_dict()
    advice = "put this run's in its place, or remove it to go on from the newest that is left"
    shapes = [{name: value.shape for name, value in state.items() if "encoder." in name} for state in (saved, own)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{file} is of another encoder: {advice}")
    memory = {name.removeprefix("loss."): value for name, value in saved.items() if name.startswith("loss.")}
    try:
        copy.deepcopy(module.get_submodule("loss")).load_state_dict(memory)
    except Exception as error:  # whatever a loss makes of foreign values
        raise ValueError(f"{file} is of another loss ({one_line(error)[:200]}): {advice}") from error


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


def _finished_epochs(run: Path, before: Config, saved: dict[str, Any]) -> int:
    """Return the epochs of the encoder that a run has finished; 0 before it has."""
    epochs: int = saved.get("finished", before.epochs if (run / "encoder.safetensors").exists() else 0)
    return epochs


def _to_json(versions: dict[str, Any]) -> str:
    return json.dumps(versions, indent=2) + "\n"


def _write(file: Path, content: str) -> None:
    with whole_file(file) as path:
        path.write_text(content)


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
