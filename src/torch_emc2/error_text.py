"""Errors in a line of text."""

from __future__ import annotations

__all__ = ["cause", "one_line"]


def cause(error: BaseException) -> str:
    """Return an error's own words as one line, without the traceback that a loader's worker puts before them."""
    text = str(error).strip() or repr(error)
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())


def one_line(error: BaseException) -> str:
    """Return an error as one line of text, to be quoted in another."""
    return " ".join(f"{type(error).__name__}: {error}".split())
