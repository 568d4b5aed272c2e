"""A run's folder: what a run writes down of itself, and what must be the same for it to go on."""

from __future__ import annotations

import contextlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from torch_emc2.config import Config, read_config, to_yaml
from torch_emc2.files import load_checkpoint, one_line, whole_file

__all__ = ["prepare_folder", "refuse_used", "validate_checkpoint"]

_PACKAGES = ("torch-emc2", "torch", "torchvision", "timm", "lightning", "scikit-learn", "numpy", "numba")


# What a run that was stopped before its first checkpoint may have left.
_BEFORE_A_CHECKPOINT = {
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


def prepare_folder(config: Config, run: Path, facts: dict[str, Any], *, resume: bool) -> None:
    """Write down what is run, and what else its results depend on; refuse to go on with a run that was another."""
    file, versions_file = run / "config.yaml", run / "versions.json"
    if resume and file.exists():
        had, has = _what_counts(read_config(str(file)), facts | _read_facts(versions_file)), _what_counts(config, facts)
        if different := [name for name in has if had.get(name) != has[name]]:
            changes = "; ".join(f"{name}: {had.get(name)}, now {has[name]}" for name in different)
            advice = f"emc2 train {file} --resume has it"
            if "images" in different:
                advice = "put back the images that it began with, or start another run by --out FOLDER"
            raise ValueError(f"cannot resume {run}: its config differs ({changes}); {advice}")
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
        raise ValueError(f"{file} is of another encoder: put this run's in its place, or remove it to start again")


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
