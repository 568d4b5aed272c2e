"""Which files of a data set cannot be read, and what range its deep values have: found before the work, and kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from torch_emc2.data.decode import FULL_16_BIT, decode, depth_of, no_range, open_image, refusal, require_finite
from torch_emc2.files import whole_file
from torch_emc2.seeds import own_generator
from torch_emc2.settings.images import Decoding

__all__ = ["Check", "check_files", "shown"]

_TAIL = 4096  # bytes at a file's end; some cameras write a little after an image's own


class Check(NamedTuple):
    """What was found.

    Attributes:
        unreadable: the files that cannot be read, and why.
        deep: those whose values are deeper than 8 bits and of no given range: what they are, the least and the largest.
    """

    unreadable: dict[str, str]
    deep: dict[str, tuple[str, float, float]]

    @property
    def unknown(self) -> dict[str, tuple[str, float, float]]:
        """Those of ``deep`` whose range is not known: of a kind that fills its own in no image.

        An image of 16 bits that is darker than others is dark.
        """
        known = {kind for kind, _, most in self.deep.values() if kind.startswith("16-bit") and most >= 2**15}
        return {file: span for file, span in self.deep.items() if span[0] not in known}

    def resolve(self, decoding: Decoding) -> tuple[Decoding, dict[str, str]]:
        """Return the decoding with the range of deep values, where it is known, and all files it cannot read."""
        unknown = {file: no_range(*span) for file, span in self.unknown.items()}
        if len(self.deep) > len(unknown):
            decoding = replace(decoding, value_range=FULL_16_BIT)
        return decoding, self.unreadable | unknown

    def refusal(self, advice: str, option: str) -> str:
        """Say in one line which files cannot be read, and what helps: ``advice``, or a range given by ``option``."""
        said = []
        if self.unreadable:
            said.append(f"{_count(self.unreadable)} cannot be read: {shown(self.unreadable)}: {advice}")
        unknown = self.unknown
        for kind in dict.fromkeys(kind for kind, _, _ in unknown.values()):
            of_kind = {file: span for file, span in unknown.items() if span[0] == kind}
            said.append(
                f"{_spans(of_kind)}, of no known range ({next(iter(of_kind))!r} first): {_likely(of_kind, option)}"
            )
        return "; ".join(said)

    def __str__(self) -> str:
        """What is to be said of deep values that are taken as they are, if there are any."""
        unknown = self.unknown
        known = {file: span for file, span in self.deep.items() if file not in unknown}
        low = sum(most < 4096 for _, _, most in known.values())
        dark = f"; {low} of them stay below 4096, as 12 bits do" if low else ""
        return f"{_spans(known)}, taken as all of 0 to 65535{dark}." if known else ""


def check_files(
    files: Sequence[str], decoding: Decoding, *, whole: bool = False, num_workers: int = 0, kept: Path | None = None
) -> Check:
    """Look at image files, with a bar on a terminal.

    Args:
        files: what should be images.
        decoding: what is made of their pixels.
        whole: decode all of them; else a JPEG and a PNG that have a header and an end are taken to be whole.
        num_workers: processes that look.
        kept: where what was found for files of these names, sizes and times is kept, and not sought again.
    """
    digest = hashlib.sha256(repr((decoding, whole)).encode())
    for path in files:
        digest.update(f"{path}\0{os.path.abspath(path)}\0{_stamp(path)}\0".encode(errors="surrogateescape"))
    known = _read(kept)
    if (found := _kept_check(known.get(digest.hexdigest()))) is not None:
        return found

    unreadable: dict[str, str] = {}
    deep: dict[str, tuple[str, float, float]] = {}
    # A generator of its own: a loader seeds its workers with a draw from torch's.
    loader = DataLoader(
        _Looked(files, decoding, whole), batch_size=None, num_workers=num_workers, generator=own_generator()
    )
    for path, finding in zip(files, tqdm(loader, "Checking images", leave=False, disable=None), strict=True):
        if isinstance(finding, str):
            unreadable[path] = finding
        elif finding is not None:
            deep[path] = tuple(finding)  # which a loader makes a list
    if kept is not None:
        content = {"unreadable": unreadable, "deep": deep}
        with whole_file(kept) as file:
            file.write_text(json.dumps({**known, digest.hexdigest(): content}, indent=1) + "\n")
    return Check(unreadable, deep)


def shown(unreadable: Mapping[str, str]) -> str:
    """Name the first of the unreadable files, and why they are."""
    named = [f"{path!r} ({why})" for path, why in list(unreadable.items())[:3]]
    return "; ".join([*named, *(["…"] if len(unreadable) > 3 else [])])


class _Looked(Dataset[str | tuple[str, float, float] | None]):
    """Of each file why it cannot be read; or the kind, least and largest of its deep values; or None."""

    def __init__(self, files: Sequence[str], decoding: Decoding, whole: bool) -> None:
        self.files, self.decoding, self.whole = files, decoding, whole

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> str | tuple[str, float, float] | None:
        path = self.files[i]
        try:
            with open_image(path, self.decoding) as file:
                depth = depth_of(file)
                if depth is not None and self.decoding.value_range is None and not depth.scaled:
                    values = np.asarray(file.convert("RGB") if depth.colour else file)
                    require_finite(values)
                    scale = 257 if depth.colour else 1
                    return depth.kind, scale * float(values.min()), scale * float(values.max())
                seems_whole = not self.whole and _has_end(path, file.format)
            if not seems_whole:
                decode(path, self.decoding)
        except Exception as error:  # Pillow's parsers raise whatever a damaged file makes of them
            return refusal(path, error)
        return None


def _has_end(path: str, kind: str | None) -> bool:
    end = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(kind or "")
    if end is None:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _TAIL))
        return end in file.read()


def _count(files: Mapping[str, object]) -> str:
    return f"{len(files)} image{'s' if len(files) > 1 else ''}"


def _spans(deep: Mapping[str, tuple[str, float, float]]) -> str:
    kinds = " and ".join(dict.fromkeys(kind for kind, _, _ in deep.values()))
    least, most = min(span[1] for span in deep.values()), max(span[2] for span in deep.values())
    return f"{_count(deep)} with {kinds} values, from {least:g} to {most:g}"


def _likely(deep: Mapping[str, tuple[str, float, float]], option: str) -> str:
    kind = next(iter(deep.values()))[0]
    least, most = min(span[1] for span in deep.values()), max(span[2] for span in deep.values())
    if "colour" in kind:
        return "scale them to 8 bits, of which Pillow keeps no more"
    most += most == least  # a range has two ends
    likely = f"0,{2 ** int(most).bit_length() - 1}" if kind == "16-bit" else f"{least:g},{most:g}"
    # After an equals sign, or a range that begins with a minus would be taken for another option.
    return f"give it, such as {option}={likely}, or {option}=1%,99% of each image's own values"


def _stamp(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _read(kept: Path | None) -> dict[str, Any]:
    """Return what is kept; nothing where that is damaged: it is found again."""
    try:
        content = json.loads(kept.read_text()) if kept is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _kept_check(content: Any) -> Check | None:
    try:
        unreadable = {file: str(why) for file, why in content["unreadable"].items()}
        deep = {file: (str(kind), float(least), float(most)) for file, (kind, least, most) in content["deep"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return Check(unreadable, deep)
