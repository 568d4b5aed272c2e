"""The fields of a run as the command's help lists them."""

from __future__ import annotations

import argparse
import shutil
from textwrap import fill

from torch_emc2.config import config_parser, presets
from torch_emc2.settings.losses import LOSSES

__all__ = ["all_fields", "groups_of_fields"]


def all_fields(prog: str) -> str:
    """Describe every field."""
    return f"{_parser(prog).format_help()}\nLOSS: {_losses()}\n"


def groups_of_fields(prog: str) -> str:
    """Name every field, group by group, on one screen."""
    parser = _parser(prog)
    lines = [parser.format_usage().rstrip(), ""]
    if "PRESET_OR_YAML" in lines[0]:
        file = "or a file, as emc2 presets NAME prints one; or folder:PATH, which is photos with its images"
        lines.append(_wrapped(f"PRESET_OR_YAML: {', '.join(presets())}, {file}"))
    lines += [_wrapped(f"LOSS: {_losses()}"), ""]
    for group in parser._action_groups:
        names = [action.dest for action in group._group_actions if action.help is not argparse.SUPPRESS]
        if names and "help" not in names:
            lines += [f"{group.title}:", _wrapped(" ".join(f"--{name}" for name in names))]
    known = "hyphens and underscores are the same"
    return "\n".join([*lines, "", f"{prog} --help all describes each; {known}.\n"])


def _parser(prog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = config_parser(prog)
    return parser


def _losses() -> str:
    return f"{', '.join(LOSSES)}, or a class of your own as package.module:Class"


def _wrapped(text: str) -> str:
    width = min(100, shutil.get_terminal_size().columns - 2)
    return fill(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
