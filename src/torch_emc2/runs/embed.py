"""A table of the embeddings of images, by a run's encoder."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from torch_emc2.data import BadImageError, DataError, FileImages, Found, ImageDataset, class_of, find_images, shown
from torch_emc2.files import whole_file
from torch_emc2.runs.adding import NO_ROWS, absolute, joined, last_change, one_range, rows_there, up_to_date
from torch_emc2.runs.finished import leave_out_advised
from torch_emc2.runs.model import Model
from torch_emc2.runs.table import EmbeddingTable, Origin, write_table

__all__ = ["Embedded", "embed_images"]

_LOG = logging.getLogger(__name__)


class Embedded(NamedTuple):
    """What became of the files that were to be embedded."""

    embedded: int
    skipped: dict[str, str]  # images that cannot be read, and why
    found: Found
    there: int  # that the table had already
    gone: int  # files of the table's that are not there any more


def embed_images(
    run: Path,
    paths: Path | Sequence[Path],
    out: Path,
    *,
    on_bad_image: Literal["raise", "skip"] | None = None,
    value_range: str | None = None,
    normalize: bool = False,
    append: bool = False,
) -> Embedded:
    """Write a Parquet table of images: ``path``, absolute, ``label``, and ``embedding``, the run's probed feature.

    The file appears once it is whole. `torch_emc2.runs.read_table` reads it, with the model that it is of.

    Args:
        run: the run's folder.
        paths: folders, with all below them, and files.
        out: the table.
        on_bad_image: what to do with an unreadable one; by default the run's setting.
        value_range: of values deeper than 8 bits; by default the run's, unless that was found in its images.
        normalize: give rows the length 1.
        append: keep the rows of the table that is there, if it is of this model, and embed what it does not have, and
            files that have changed.

    Raises:
        DataError: there is no image; or, unless they are to be skipped, one cannot be read.
        ValueError: the folder is no finished run, the table's name is not one of a Parquet file, or there is one of
            that name, another model's or not to be added to.
    """
    if out.suffix != ".parquet":
        raise ValueError(f"{out} will be a Parquet file: give it a name that ends in .parquet")
    if out.is_file() and not append:
        raise ValueError(
            f"{out} is there already: --append adds to it; for a new table give another name, or remove it"
        )
    model = Model(run, value_range=value_range)
    found_at = last_change(str(out))
    before = rows_there(out, Origin(model.identity, str(run), normalize)) if append and out.exists() else NO_ROWS
    folders = [paths] if isinstance(paths, Path) else paths
    named = ", ".join(repr(str(path)) for path in folders)
    found = find_images(*folders)
    if not found.files:
        raise DataError(f"no images in {named}: give images, or folders that hold some. {found}".rstrip())
    files = _once(found.files, folders)
    known = dict(zip(map(os.path.realpath, before.paths), before.modified, strict=True))
    new = [path for path in files if not up_to_date(path, known)]
    there = len(files) - len(new)
    _LOG.info("%s: %d images to embed. %s", named, len(new), found)
    skip = (on_bad_image or model.config.data.on_bad_image) == "skip"
    check = model.check(new, whole=skip)
    decoding, unreadable = check.resolve(model.decoding)
    if unreadable and not skip:
        advice = "mend or remove them, or leave them out by --on-bad-image skip"
        raise BadImageError(check.refusal(advice, "--value-range"))
    good = [path for path in new if path not in unreadable]
    outdated = not known.keys().isdisjoint(map(os.path.realpath, unreadable))
    if not (good or there or outdated):
        raise DataError(f"none of the {len(found.files)} images in {named} can be read: {shown(unreadable)}")
    names = list(map(absolute, good))
    for name in names:
        if name != name.encode(errors="replace").decode():
            raise DataError(
                f"the name {name!r} is not UTF-8, which a table's text must be: rename the file, or its folder"
            )
    modified = [last_change(path) for path in good]  # before they are read
    origin = Origin(model.identity, str(run), normalize, decoding.value_range)
    if before.origin is not None:
        origin = replace(origin, value_range=one_range(before.origin, origin, out))
    if good or outdated:
        with whole_file(out) as file:
            file.touch()  # fails now where it cannot be written, not after the work
            embeddings = before.embeddings[:0]
            if good:
                with leave_out_advised(run):
                    embeddings = model.features(ImageDataset(FileImages(good, decoding)), normalize=normalize)
            labels = [class_of(path, folders) for path in good]
            table = EmbeddingTable(names, labels, embeddings, origin, modified)
            if last_change(str(out)) != found_at:
                raise ValueError(f"{out} was changed by another process meanwhile, and stays: start again")
            write_table(joined(before, table, new), file)
    gone = sum(not os.path.exists(path) for path in before.paths)
    return Embedded(len(good), unreadable, found, there, gone)


def _once(files: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Leave out files that come a second time, by a link or another name of their folder; one with a class stays."""
    chosen: dict[str, str] = {}
    for path in files:
        before = chosen.setdefault(absolute(path), path)
        if class_of(before, folders) is None and class_of(path, folders) is not None:
            chosen[absolute(path)] = path
    return list(chosen.values())
