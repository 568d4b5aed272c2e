"""Tells at the end how many inputs were tried."""

from typing import Any

from fuzzing import TRIED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TRIED:
        tried = ", ".join(f"{part} {count}" for part, count in TRIED.items())
        terminalreporter.write_line(f"inputs tried: {tried}")
