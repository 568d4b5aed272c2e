"""What the command's arguments may be, told before torch is imported, which takes seconds."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch_emc2.names import did_you_mean
from torch_emc2.run_folder import require_finished
from torch_emc2.settings.images import parse_range, require_data

__all__ = [
    "Parser",
    "csv",
    "data_set",
    "embedded",
    "finished_run",
    "hub_name",
    "images",
    "parquet",
    "path",
    "picture",
    "similarity",
    "table",
    "value_range",
    "whole",
]

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise it as the user's to mend."""
        word = message.removeprefix("unrecognized arguments: ")
        if not word.strip():
            message += "an empty word"
        meant = did_you_mean(word.split()[0], [*self._option_string_actions]) if word.startswith("--") else ""
        raise ValueError(f"{message}{meant} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take an option with underscores in the place of hyphens too."""
        parted = (word.partition("=") for word in args)
        plain = (((name.replace("_", "-"), *value), (name, *value)) for name, *value in parted)
        known = self._option_string_actions
        return super().parse_known_args(["".join(a if a[0] in known else b) for a, b in plain], namespace)


def _telling(read: Callable[[str], T]) -> Callable[[str], T]:
    """Have argparse say what a ValueError says, and not only which word is wrong."""

    def told(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return told


def whole(least: int) -> Callable[[str], int]:
    """Return what reads a whole number that is at least so large."""

    @_telling
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"must be a whole number, at least {least}, got {text!r}")
        return int(text)

    return read


def path(text: str) -> Path:
    """Give a path as a shell would have: one that follows an equals sign keeps its ~."""
    return Path(os.path.expanduser(text))


def _written(kind: str, suffix: str) -> Callable[[str], Path]:
    """Return what reads the name of a file that is to be written."""

    @_telling
    def read(text: str) -> Path:
        if not text.endswith(suffix):
            raise ValueError(f"{text} will be {kind}: give it a name that ends in {suffix}")
        return path(text)

    return read


parquet = _written("a Parquet file", ".parquet")
picture = _written("a PNG", ".png")
csv = _written("a CSV", ".csv")


@_telling
def images(text: str) -> Path:
    """Read the name of an image, or of a folder of some."""
    if not os.path.exists(path(text)):
        raise ValueError(f"there is no {text!r}: give images, or folders that hold some")
    return path(text)


@_telling
def table(text: str) -> Path:
    """Read the name of a table that is there."""
    source = parquet(text)
    if not os.path.isfile(source):
        raise ValueError(f"there is no {text!r}: emc2 embed RUN FOLDER -o {text} writes it")
    return source


@_telling
def similarity(text: str) -> float:
    """Read a cosine."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1 <= value <= 1:
        raise ValueError(f"must be a cosine, from -1 to 1, got {text!r}")
    return value


@_telling
def embedded(text: str) -> Path:
    """Read the name of a table of embeddings, or the folder of a run that has come to its end."""
    if text.endswith(".parquet"):
        return table(text)
    require_finished(path(text))
    return path(text)


@_telling
def finished_run(text: str) -> Path:
    """Read the folder of a run that has come to its end."""
    run = path(text)
    require_finished(run)
    return run


@_telling
def hub_name(text: str) -> str:
    """Read the name of a repository of the Hugging Face hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise ValueError(f"must be OWNER/NAME, got {text!r}")
    return text


@_telling
def data_set(text: str) -> str:
    """Read a data set's name."""
    require_data(text)
    return text


@_telling
def value_range(text: str) -> str:
    """Read which values become black and white."""
    parse_range(text)
    return text
