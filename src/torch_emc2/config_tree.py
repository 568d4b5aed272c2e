"""What a YAML file, or a command line, may hold where a dataclass has fields and groups of fields."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from torch_emc2.names import did_you_mean

__all__ = ["load_tree", "refuse_extremes", "refuse_groups", "refuse_unknown", "validate_tree"]

_MOST_VALUES = 10_000
_LARGEST = 2**32 - 1  # seeds go so far; no other whole number comes near

Names = tuple[str, ...]


def load_tree(text: str, file: Path) -> Any:
    """Load a YAML file's text.

    Raises:
        ValueError: it is none, or too large once its aliases are written out.
    """
    try:
        size = _size(yaml.compose(text, yaml.SafeLoader), {})
        tree = yaml.safe_load(text) if size <= _MOST_VALUES else None
    except Exception as error:  # PyYAML raises whatever a wrong value makes of it, AttributeError included
        raise ValueError(f"{str(file)!r} is not YAML ({type(error).__name__}: {error})") from error
    if size > _MOST_VALUES:
        raise ValueError(f"{str(file)!r} has more than {_MOST_VALUES} values, its aliases written out: write fewer")
    return tree


def _size(node: Any, known: dict[int, int]) -> int:
    """Count the values of a YAML node with its aliases written out; each node is looked at once."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES  # for an alias of what it stands in
        inner: Iterable[Any] = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            inner = itertools.chain(*inner)
        known[id(node)] = 1 + sum(_size(child, known) for child in inner)
    return known[id(node)]


def validate_tree(tree: Any, kind: type) -> None:
    """Refuse what is no field, null where a field has no such value, and a class in the place of a group of fields.

    A class jsonargparse would import, and run its module.
    """
    hints = dict(_hints(kind))
    for path, value in _leaves(tree):
        name, hint = ".".join(path), hints.get(path)
        if "class_path" in path or is_dataclass(hint):
            raise ValueError(f"{name} must be fields and their values, got {'null' if value is None else repr(value)}")
        if value is None and hint is not None and NoneType not in get_args(hint):
            raise ValueError(f"{name} must not be null: give a value, or leave the line out for the default")
    refuse_unknown([".".join(path) for path, _ in _leaves(tree) if path], kind)


def refuse_groups(words: Sequence[str], kind: type) -> None:
    """Refuse a file or class in the place of a group of fields on the command line, for the same reason."""
    groups = {".".join(path) for path, hint in _hints(kind) if is_dataclass(hint)}
    for word in words:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and (name in groups or "class_path" in name.split(".")):
            raise ValueError(f"{word} must be a field of a group and its value, as --optimizer.lr 0.1")


def refuse_unknown(names: Iterable[str], kind: type, sign: str = "") -> None:
    """Refuse names that no field has, each after ``sign``, with those that may have been meant."""
    known = [sign + ".".join(path) for path, hint in _hints(kind) if not is_dataclass(hint)]
    for name in names:
        if name not in (*known, "--help"):
            raise ValueError(f"there is no field {name}{did_you_mean(name, known)} (emc2 train --help lists them)")


def refuse_extremes(tree: Any) -> None:
    """Refuse numbers that nothing could be computed with, whatever they are of."""
    for path, value in _leaves(tree):
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{'.'.join(path)} must be finite, got {value}")
            if isinstance(number, int) and abs(number) > _LARGEST:
                raise ValueError(f"{'.'.join(path)} must be at most {_LARGEST}, got {value}")


def _hints(kind: type, path: Names = ()) -> Iterator[tuple[Names, Any]]:
    """Give the types of all fields and groups of fields."""
    for name, hint in get_type_hints(kind).items():
        yield (*path, name), hint
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _hints(hint, (*path, name))


def _leaves(tree: Any, path: Names = ()) -> Iterator[tuple[Names, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, *str(key).split(".")))
    else:
        yield path, tree
