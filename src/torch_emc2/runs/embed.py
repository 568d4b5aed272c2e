"""A table of the embeddings of images, by a run's encoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from torch_emc2.data import (
    BadImageError,
    DataError,
    FileImages,
    Found,
    ImageDataset,
    check_files,
    evaluation_transform,
    find_images,
    shown,
)
from torch_emc2.evaluation import extract_features
from torch_emc2.files import whole_file
from torch_emc2.runs.finished import leave_out_advised, load_run

__all__ = ["Embedded", "embed_images"]

_LOG = logging.getLogger(__name__)


class Embedded(NamedTuple):
    """What became of the files that were to be embedded."""

    embedded: int
    skipped: dict[str, str]  # images that cannot be read, and why
    found: Found


def embed_images(
    run: Path,
    paths: Path | Sequence[Path],
    out: Path,
    *,
    on_bad_image: Literal["raise", "skip"] | None = None,
    value_range: str | None = None,
) -> Embedded:
    """Write a Parquet table of images: ``path``, and ``embedding``, the run's probed feature.

    The file appears once it is whole.

    Args:
        run: the run's folder.
        paths: folders, with all below them, and files.
        out: the table.
        on_bad_image: what to do with an unreadable one; by default the run's setting.
        value_range: of values deeper than 8 bits; by default the run's, unless that was found in its images.

    Raises:
        DataError: there is no image; or, unless they are to be skipped, one cannot be read.
        ValueError: the folder is no finished run, or the table's name is not one of a Parquet file.
    """
    if out.suffix != ".parquet":
        raise ValueError(f"{out} will be a Parquet file: give it a name that ends in .parquet")
    config, encoder, device = load_run(run)
    data, paths = config.data, [paths] if isinstance(paths, Path) else paths
    named = ", ".join(repr(str(path)) for path in paths)
    found = find_images(*paths)
    if not found.files:
        raise DataError(f"no images in {named}: give images, or folders that hold some. {found}".rstrip())
    _LOG.info("%s: %d images to embed. %s", named, len(found.files), found)
    skip = (on_bad_image or data.on_bad_image) == "skip"
    decoding = replace(data.decoding, value_range=value_range or data.value_range)
    check = check_files(found.files, decoding, whole=skip, num_workers=data.num_workers)
    decoding, unreadable = check.resolve(decoding)
    if unreadable and not skip:
        advice = "mend or remove them, or leave them out by --on-bad-image skip"
        raise BadImageError(check.refusal(advice, "--value-range"))
    good = [path for path in found.files if path not in unreadable]
    if not good:
        raise DataError(f"none of the {len(found.files)} images in {named} can be read: {shown(unreadable)}")
    for path in good:
        if path != path.encode(errors="replace").decode():
            raise DataError(f"the name {path!r} is not UTF-8, which a table's text must be: rename the file")
    images = ImageDataset(FileImages(good, decoding), channels=encoder.channels)
    with whole_file(out) as file:
        file.touch()  # fails now where it cannot be written, not after the work
        with leave_out_advised(run):
            embeddings = extract_features(
                encoder.features,
                images,
                evaluation_transform(encoder.image_size),
                device=device,
                num_workers=data.num_workers,
                progress=True,
            )
        table = pa.table({
            "path": good,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.flatten().numpy()), embeddings.shape[1]),
        })  # fmt: skip
        pq.write_table(table, file)
    return Embedded(len(good), unreadable, found)
