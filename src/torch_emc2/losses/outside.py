"""A loss of the user's own, by the name of its class: ``package.module:Class``."""

from __future__ import annotations

import importlib
from typing import Any

from torch_emc2.error_text import one_line
from torch_emc2.losses.base import ContrastiveLoss

__all__ = ["load_outside", "make_outside"]


def load_outside(name: str) -> type[ContrastiveLoss]:
    """Import the class of a name ``package.module:Class``.

    Raises:
        ValueError: there is no such module or class, or it is not derived from `ContrastiveLoss`.
    """
    module, _, attribute = name.partition(":")
    try:
        loss = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:  # a module that is run may raise anything
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        where = f"; PYTHONPATH=FOLDER says where {module} is" if missing else ""
        raise ValueError(f"loss {name} cannot be imported ({one_line(error)}){where}") from error
    if not (isinstance(loss, type) and issubclass(loss, ContrastiveLoss)):
        raise ValueError(f"loss {name}: {module} has no class {attribute} derived from torch_emc2.ContrastiveLoss")
    return loss


def make_outside(loss: type[Any], **given: Any) -> ContrastiveLoss:
    """Build a loss of a class, with keyword arguments.

    Raises:
        ValueError: its constructor takes other arguments.
    """
    try:
        made: ContrastiveLoss = loss(**given)
    except TypeError as error:
        keywords = ", ".join(f"{name}=…" for name in given)
        raise ValueError(f"loss {loss.__name__} must take ({keywords}): {error}") from error
    return made
