"""The code in docs/trainers.md."""

import re
from pathlib import Path

__all__ = ["code_of_page"]


def code_of_page(library: str) -> str:
    """Return the block that imports our loss for a library; the reader's own names are to be given."""
    page = (Path(__file__).parents[2] / "docs/trainers.md").read_text()
    (block,) = (
        block for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if f"integrations.{library}" in block
    )
    return str(block)
