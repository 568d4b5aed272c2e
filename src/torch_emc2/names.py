"""What a wrong name was meant to be."""

from collections.abc import Sequence
from difflib import get_close_matches

__all__ = ["did_you_mean"]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return a question with the names that end as a wrong one does, or are like it; nothing where none is."""
    near = [other for other in known if _last(other) == _last(name)] or get_close_matches(name, known, 1)
    if not near:
        ends = get_close_matches(_last(name), [_last(other) for other in known], 1)
        near = [other for other in known if _last(other) in ends]
    return f": did you mean {' or '.join(near)}?" if near else ""


def _last(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2]
