"""What a folder of images is: which files are images, which of them are trained on, what their classes are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from PIL import Image

from torch_emc2.data.decode import formats, heif_bytes, open_image
from torch_emc2.data.errors import DataError
from torch_emc2.error_text import one_line
from torch_emc2.settings.images import Decoding

__all__ = ["NO_TEST_PART", "Found", "ImageFolder", "class_of", "find_images", "part_of", "read_folder"]

NO_TEST_PART = (
    "There is no test part: all are trained on, and a fixed fifth of each class tests the probe that is fitted on the "
    "rest."
)
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_HEIF = {".heic", ".heif", ".hif"}  # images, whether or not Pillow can open them here
_RAW = {".arw", ".cr2", ".dng", ".nef", ".orf", ".pef", ".rw2", ".srw"}  # TIFFs in which Pillow finds a thumbnail
# Known by their first bytes; other formats Pillow would find in files of any kind.
_SIGNED = {"AVIF", "BMP", "DDS", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "TIFF", "WEBP"}


@dataclass(frozen=True)
class Found:
    """What is in folders.

    Attributes:
        files: the images, in order of their names.
        left_out: how many files of what kind are none.
    """

    files: list[str]
    left_out: Counter[str]

    def __str__(self) -> str:
        """What was left out, if there is any."""
        if not self.left_out:
            return ""
        kinds = [f"{count} {kind}" for kind, count in self.left_out.most_common(6)]
        return f"Left out: {', '.join(kinds)}{', …' if len(self.left_out) > 6 else ''}."


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images with its splits and classes.

    Attributes:
        path: the folder.
        train: its images to train on, each with its class, a path relative to the split's folder.
        held_out: those never to be trained on, likewise; None where the folder has no such split.
        train_name: name of the folder that has the images to train on; None where that is ``path``.
        held_out_name: likewise.
        classes: of both.
        left_out: of the files in it, what is used for nothing.
    """

    path: Path
    train: Sequence[tuple[str, str]]
    held_out: Sequence[tuple[str, str]] | None
    train_name: str | None
    held_out_name: str | None
    classes: Sequence[str]
    left_out: Found

    def __str__(self) -> str:
        """What was understood, in a few sentences."""
        where = f" in {self.train_name + '/'!r}" if self.train_name else ""
        said = [f"{str(self.path)!r}: {len(self.train)} training images{where}, {_classes(self.train)}."]
        if self.held_out is not None:
            where = f" in {self.held_out_name + '/'!r}" if self.held_out_name else ""
            said.append(f"Held out, to test on: {len(self.held_out)}{where}, {_classes(self.held_out)}.")
        elif self.classes:
            said.append(NO_TEST_PART)
        return " ".join([*said, str(self.left_out)]).rstrip()


def read_folder(path: Path) -> ImageFolder:
    """Find a folder's images, its splits by their usual names, and its classes, the folders that hold images.

    Raises:
        DataError: it is no folder, has too few images, or can be understood in more than one way.
    """
    if not os.path.isdir(path):  # Path's own raises where the name is too long
        raise DataError(f"{str(path)!r} is not a folder; give one that holds images, as folder:PATH")
    found = find_images(path)
    inside: dict[str, list[str]] = {}  # files by the folder in ``path`` that they lie in, or "" for itself
    for file in found.files:
        first, *rest = Path(file).relative_to(path).parts
        inside.setdefault(first if rest else "", []).append(file)
    parts = _splits(path, inside)
    if not parts:
        train = _with_classes(found.files, path)
        return ImageFolder(path, train, None, None, None, _names(train), found)

    train_name = parts["train"]
    held_out_name = parts.get("test", parts.get("validation"))
    train = _with_classes(inside.get(train_name, []), path / train_name)
    held_out = None
    if held_out_name is not None:
        held_out = _with_classes(inside.get(held_out_name, []), path / held_out_name, at_least=1)
    left_out = found.left_out.copy()
    for name, files in inside.items():
        if name not in (train_name, held_out_name):
            left_out[f"images in {name!r}" if name else "images beside the splits"] = len(files)
    # Both splits number the classes of either, so that a label means the same in both.
    classes = sorted({*_names(train), *_names(held_out or ())})
    return ImageFolder(path, train, held_out, train_name, held_out_name, classes, Found(found.files, left_out))


def part_of(name: str) -> str | None:
    """Return which part a split of this name is, "train", "validation" or "test"; None for no known one."""
    return _PARTS.get(name.casefold())


def find_images(*paths: Path) -> Found:
    """Find all images in folders and below them, by name or, where that does not tell, by content.

    What is hidden is left out, and folders of runs, which hold pictures of their own. A path that is a file counts as
    an image, whatever its name.

    Raises:
        DataError: there is no such path, or a folder cannot be listed.
    """
    files, left_out = [str(path) for path in paths if os.path.isfile(path)], Counter[str]()
    folders = [path for path in paths if not os.path.isfile(path)]
    for path in folders:
        if not os.path.exists(path):
            raise DataError(f"there is no {str(path)!r}: give images, or folders that hold some")
    for entry in chain.from_iterable(_walk(str(folder), ()) for folder in folders):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif _is_folder(entry):
            left_out["folders of runs"] += 1
        elif _is_special(entry):
            left_out["that are no files"] += 1
        elif suffix in _suffixes() or (suffix not in _known_not() and _is_image(entry.path)):
            files.append(str(Path(entry.path)))  # without a leading ./
        else:
            left_out[suffix if suffix.isprintable() and suffix else "without suffix"] += 1
    return Found(sorted(set(files)), left_out)


def class_of(file: str, folders: Sequence[Path]) -> str | None:
    """Return the class of an image found in one of these folders, as `read_folder` names it; None where it has none."""
    for folder in folders:
        if (inside := Path(file).parent).is_relative_to(folder):
            parts = inside.relative_to(folder).parts
            if parts and part_of(parts[0]):
                parts = parts[1:]
            return "/".join(parts) or None
    return None


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[os.DirEntry[str]]:
    """Give all files below a folder; of what is hidden, and of runs' folders, the name alone."""
    real = os.path.realpath(folder)
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError as error:
        raise DataError(f"{folder!r} cannot be listed ({one_line(error)}): allow it, or move it away") from error
    for entry in entries:
        if entry.name.startswith(".") or not _is_folder(entry) or _is_run(entry.path):
            yield entry
        elif not any(Path(path).is_relative_to(os.path.realpath(entry.path)) for path in (*above, real)):
            yield from _walk(entry.path, (*above, real))  # but a link to a folder above would be followed for ever


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # known without asking for more


def _is_run(folder: str) -> bool:
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("config.yaml", "versions.json"))


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Tell whether opening it might wait for ever; a link to nothing does not."""
    if entry.is_symlink():
        return os.path.exists(entry.path) and not os.path.isfile(entry.path)
    return not entry.is_file()


@cache
def _suffixes() -> frozenset[str]:
    """Return the suffixes, with their dots, of what Pillow opens here."""
    known = {*formats(), "MPO"}  # the JPEG of many frames
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known) | _HEIF


@cache
def _known_not() -> frozenset[str]:
    return (frozenset(Image.registered_extensions()) | _RAW) - _suffixes()


def _is_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            if heif_bytes(file.read(12)):
                return True
        kinds = (name for name in formats() if name in _SIGNED)
        with open_image(path, Decoding(max_pixels=2**63), tuple(kinds)):
            return True
    except Exception:  # Pillow's parsers raise whatever foreign bytes make of them
        return False


def _splits(path: Path, inside: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return part by part the folder in ``path`` that has it, an empty one too; nothing where there is no part."""
    parts: dict[str, str] = {}
    for name in sorted(os.listdir(path)):
        part = part_of(name)
        if part is None or not os.path.isdir(path / name):
            continue
        if part in parts:
            raise DataError(f"{str(path)!r} has both {parts[part]!r} and {name!r} for its {part} part: rename one")
        parts[part] = name
    if not any(inside.get(name) for name in parts.values()):
        return {}
    others = [name for name in inside if name and name not in parts.values()]
    if "train" not in parts:
        named = ", ".join(map(repr, parts.values()))
        raise DataError(
            f"{str(path)!r} has {named} to test on, but no folder 'train': name what is to be trained on so"
        )
    if others and len(parts) == 1:
        raise DataError(
            f"{str(path)!r} has {parts['train']!r} beside {', '.join(map(repr, others[:3]))}, a class or all that is "
            "to be trained on: move the others into it, or rename it"
        )
    return parts


def _with_classes(files: Sequence[str], folder: Path, at_least: int = 2) -> list[tuple[str, str]]:
    """Pair images with the folder that holds them, relative to ``folder`` ('.' for that)."""
    if len(files) < at_least:
        raise DataError(f"{str(folder)!r} holds {len(files)} images, at least {at_least} are needed; put images there")
    return [(file, Path(file).parent.relative_to(folder).as_posix()) for file in files]


def _names(listing: Sequence[tuple[str, str]]) -> list[str]:
    """Return the classes, none where all images lie directly in the folder."""
    names = sorted({name for _, name in listing})
    return names if names != ["."] else []


def _classes(listing: Sequence[tuple[str, str]]) -> str:
    counts = Counter(name for _, name in listing)
    if set(counts) == {"."}:
        return "without classes"
    name, least = min(counts.items(), key=lambda item: item[1])
    most = max(counts.values())
    sizes = f"{least}" if least == most else f"{least} ({name!r}) to {most}"
    return f"{len(counts)} classes of {sizes} images"
