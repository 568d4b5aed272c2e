"""Text in pictures: of scripts that matplotlib's own font lacks, too, and no wider than there is room."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib import rc_context, rcParams
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties, fontManager

__all__ = ["fitted", "lettered", "wrapped"]

_LOG = logging.getLogger(__name__)
_BOX = "missing from font"

# What Linux, macOS and Windows have for Chinese, Japanese and Korean, and for symbols.
_OTHERS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Segoe UI Symbol",
    "Noto Emoji",
    "Symbola",
)


@contextmanager
def lettered() -> Iterator[None]:
    """Take what matplotlib's own font lacks from fonts that are installed; what none has is a box, and is said.

    Around all of a picture: a text takes its fonts when it is placed.
    """
    installed = {font.name for font in fontManager.ttflist}
    families = [*rcParams["font.family"], *(name for name in _OTHERS if name in installed)]
    log = logging.getLogger("matplotlib.font_manager")  # which misses weights of theirs
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with rc_context({"font.family": families}), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
    finally:
        log.setLevel(level)
    if any(_BOX in str(each.message) for each in said):
        _LOG.info(
            "Boxes in the picture stand for letters that no font here has; Noto Sans CJK has Chinese, Japanese, Korean."
        )
    for each in said:
        if _BOX not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def fitted(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """Return a text as one line of at most this width: of a longer one the middle is left out."""
    text = repr(text)[1:-1]
    if _width(text, size, weight) <= inches:
        return text
    kept = min(len(text), 200) - 1
    while (
        kept > 1
        and _width(shorter := f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}", size, weight) > inches
    ):
        kept -= 1
    return shorter


def wrapped(text: str, inches: float, size: float) -> str:
    """Break a text into lines of at most this width, between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(longer, size) > inches:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(fitted(line, inches, size) for line in lines)


def _width(text: str, size: float, weight: str = "normal") -> float:
    font = FontProperties(size=size, weight=weight)
    points: float = _RULER.get_text_width_height_descent(text, font, ismath=False)[0]  # type: ignore[no-untyped-call]
    return points / 72


_RULER = RendererAgg(1, 1, 72)  # type: ignore[no-untyped-call]
