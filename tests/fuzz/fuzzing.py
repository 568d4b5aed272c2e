"""How much is tried: examples are the same in every run; EMC2_FUZZ=10 tries ten times as many."""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings

SCALE = int(os.environ.get("EMC2_FUZZ", "1"))
TRIED: Counter[str] = Counter()
T = TypeVar("T")


def fuzz(examples: int) -> Any:
    """Hypothesis settings for so many examples."""
    return settings(
        max_examples=SCALE * examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def refusal(part: str, call: Callable[[], T]) -> tuple[T | None, str]:
    """What a call gives and "", or None and its error's words; other errors than those of bad input pass through."""
    TRIED[part] += 1
    try:
        return call(), ""
    except (ValueError, TypeError, IndexError) as error:
        words = str(error)
    assert words.strip()
    return None, words
