"""What must be so for a run to begin in a folder, or to go on there as the same run."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from torch_emc2.checkpoint import load_checkpoint
from torch_emc2.config import Config, recorded_config, to_yaml
from torch_emc2.error_text import one_line
from torch_emc2.run_folder import finished_epochs, has_results, read_facts, resume_command
from torch_emc2.settings.losses import LOSSES, group_of, is_outside

__all__ = ["find_checkpoint", "refuse_another", "validate_checkpoint"]


def find_checkpoint(run: Path) -> Path | None:
    """Return the last checkpoint; where it is gone, the newest of the others that are whole; None before the first.

    Raises:
        ValueError: there is none any more, and a start would write over what the run has come to.
    """
    folder = run / "checkpoints"
    last = folder / "last.ckpt"
    if last.exists():
        return last
    steps = {}
    for file in sorted(folder.glob("*.ckpt")):
        with contextlib.suppress(ValueError):  # damaged
            steps[file] = load_checkpoint(file)["global_step"]
    if steps:
        newest = max(steps, key=steps.__getitem__)
        rank_zero_only(print)(
            f"emc2: {last} is gone: going on from {newest.name}, step {steps[newest]}", file=sys.stderr
        )
        return newest
    if has_results(run):
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
    if not (run / "config.yaml").exists():
        return
    had, has = _what_counts(recorded_config(run), facts | read_facts(run)), _what_counts(config, facts)
    if checkpoint is not None:
        fewest = max(load_checkpoint(checkpoint)["epoch"] + 1, finished_epochs(run))
        if config.epochs >= fewest:
            had["epochs"] = config.epochs
    if different := [name for name in has if had.get(name) != has[name]]:
        changes = "; ".join(f"{name}: {had.get(name)}, now {has[name]}" for name in different)
        advice = f"{resume_command(run)} has it"
        if "images" in different:
            advice = (
                "it goes on with the very images that it began with: move away what was added and put back what is "
                "gone, or start another run by --out FOLDER"
            )
        raise ValueError(f"cannot resume {run}: its config differs ({changes}); {advice}")


def validate_checkpoint(file: Path, module: nn.Module) -> None:
    """Raise ValueError where a checkpoint cannot be read, or is one of another encoder or loss."""
    saved, own = load_checkpoint(file)["state_dict"], module.state_dict()
    advice = "put this run's in its place, or remove it to go on from the newest that is left"
    shapes = [
        {name: value.shape for name, value in state.items() if name.startswith("encoder.")} for state in (saved, own)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{file} is of another encoder: {advice}")
    memory = {name.removeprefix("loss."): value for name, value in saved.items() if name.startswith("loss.")}
    try:
        copy.deepcopy(module.get_submodule("loss")).load_state_dict(memory)
    except Exception as error:  # whatever a loss makes of foreign values
        raise ValueError(f"{file} is of another loss ({one_line(error)[:200]}): {advice}") from error


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
        "data.decode_once",
        "data.num_workers",
        "data.on_bad_image",
    ):
        fields.pop(name)
    if not is_outside(config.loss):  # which may read any
        others = {group_of(name) for name in LOSSES if name != config.loss}
        fields = {name: value for name, value in fields.items() if name.partition(".")[0] not in others}
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
