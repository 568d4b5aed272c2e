"""The images of a run: checked before it starts, and the same ones whenever it goes on or is looked at."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from torch_emc2.config import Config, DataConfig
from torch_emc2.data import BadImageError, DataError, ImageDataset, Split, check_files, open_splits, shown
from torch_emc2.error_text import one_line
from torch_emc2.files import whole_file
from torch_emc2.run_folder import read_facts
from torch_emc2.settings.images import Decoding

__all__ = ["evaluation_parts", "first_images", "folder_of", "own_data", "readable_images", "same_images"]

_LOG = logging.getLogger(__name__)


def first_images(config: Config, run: Path) -> ImageDataset:
    """Return the images that a new run trains on, deep values among them in the range that was given or is found.

    All images of its data set are looked at. ``unreadable.json`` in the run's folder names those that cannot be read;
    they are left out, or stop it.

    Raises:
        BadImageError: some cannot be read, and are not to be skipped.
        DataError: the images are not there, or too few of them can be read, or the range of their values is not known.
    """
    data = config.data
    splits: list[Split] = ["train", "test"] if data.name.startswith("folder:") else ["train"]
    images, *others = _open(config, splits)  # evaluation will want a folder's test part
    files = images.files()
    if not files:
        return images.decoded(data.decoding)
    if others:
        files = sorted({*files, *others[0].files()})
    check = check_files(files, data.decoding, num_workers=data.num_workers, kept=run / "checked.json")
    if str(check):
        _LOG.info("%s", check)
    decoding, unreadable = check.resolve(data.decoding)
    _write_unreadable(run, {os.path.relpath(file, _base(data)): why for file, why in unreadable.items()})
    if unreadable and data.on_bad_image == "raise":
        raise BadImageError(
            check.refusal(
                f"all in {run / 'unreadable.json'}; mend or remove them, or add --data.on_bad_image skip",
                "--data.value_range",
            )
        )
    _say_left_out(unreadable, len(files), f" (all in {run / 'unreadable.json'})")
    return _readable(images.decoded(decoding), unreadable, 2)


def same_images(config: Config, run: Path) -> ImageDataset:
    """Return what `first_images` returned when the run began."""
    config = replace(config, data=own_data(config.data, run))
    (images,) = _open(config, ["train"])
    return images.decoded(_run_decoding(config.data, run)).without(_left_out(config.data, run))


def readable_images(config: Config, run: Path) -> ImageDataset:
    """Return the images that a run was trained on; those that it skipped as unreadable are left out."""
    images = same_images(config, run)
    if config.data.on_bad_image == "raise" or not images.in_files or images.decoding is None:
        return images
    workers, kept = config.data.num_workers, run / "checked.json"
    unreadable = check_files(images.files(), images.decoding, whole=True, num_workers=workers, kept=kept).unreadable
    _say_left_out(unreadable, len(images))
    return images.without(unreadable)


def evaluation_parts(config: Config, run: Path, *, own: bool = True) -> tuple[ImageDataset, ImageDataset]:
    """Return what a probe of a data set is fitted on, and what it is tested on.

    Unreadable images stop it, or are left out, as in training. They are sought in both parts together: a range of deep
    values is that of both.

    Args:
        config: the run's; its data set may be another.
        run: the run's folder.
        own: it is the run's data set: what the run left out at its start stays so, and so does a range it found.

    Raises:
        BadImageError: some cannot be read, and are not to be skipped.
        DataError: the images are not there, or none of a part can be read.
    """
    data = own_data(config.data, run) if own else config.data
    decoding = _run_decoding(data, run) if own else data.decoding
    train, test = open_splits(data.name, ("probe", "test"), Path(data.root), channels=data.channels)
    files = {*train.files(), *test.files()}
    if not files:
        return train.decoded(decoding), test.decoded(decoding)
    left_out = {file: why for file, why in _left_out(data, run).items() if file in files} if own else {}
    skip, look = data.on_bad_image == "skip", sorted(files - left_out.keys())
    check = check_files(look, decoding, whole=skip, num_workers=data.num_workers, kept=run / "checked.json")
    decoding, unreadable = check.resolve(decoding)
    if unreadable and not skip:
        setting = f"data.on_bad_image: skip in {run / 'config.yaml'}"
        raise BadImageError(check.refusal(f"mend or remove them, or leave them out by {setting}", "--value-range"))
    unreadable = left_out | unreadable
    _say_left_out(unreadable, len(files))
    train, test = (_readable(part.decoded(decoding), unreadable, 1) for part in (train, test))
    return train, test


def _run_decoding(data: DataConfig, run: Path) -> Decoding:
    """Return how the run's own images are decoded: where no range is given, in the one found when it began."""
    if data.value_range is not None:
        return data.decoding
    return replace(data.decoding, value_range=read_facts(run).get("value_range"))


def _readable(images: ImageDataset, unreadable: Mapping[str, str], least: int) -> ImageDataset:
    """Leave out the unreadable ones, if enough are left."""
    left = images.without(unreadable)
    if len(left) < least:
        named = {file: why for i in range(len(images)) if (why := unreadable.get(file := str(images.path(i))))}
        raise DataError(
            f"{len(left)} of {len(images)} images can be read, at least {least} are needed: {shown(named)}: mend them"
        )
    return left


def _open(config: Config, splits: Sequence[Split]) -> list[ImageDataset]:
    data = config.data
    return open_splits(data.name, splits, Path(data.root), channels=data.channels, limit=data.limit, seed=config.seed)


def folder_of(data: DataConfig) -> str | None:
    """Return the absolute path of a folder of images; None of other data sets."""
    return os.path.abspath(_base(data)) if data.name.startswith("folder:") else None


def own_data(data: DataConfig, run: Path) -> DataConfig:
    """Return a run's own data: a relative folder counts from where the run was started, as long as it is there.

    Raises:
        DataError: it is neither there nor here.
    """
    here = folder_of(data)
    if here is None or os.path.isabs(_base(data)):
        return data
    there = read_facts(run).get("folder") or here
    if os.path.isdir(there):
        return data if there == here else replace(data, name=f"folder:{there}")
    if not os.path.isdir(here):
        raise DataError(
            f"{there!r}, the run's folder of images, is not there: put it back, or go to where {data.name} is"
        )
    _LOG.warning("%r, the run's folder of images, is not there: %r is taken for it", there, here)
    return data


def _left_out(data: DataConfig, run: Path) -> dict[str, str]:
    """Return the files that the run left out at its start, and why."""
    return {str(Path(_base(data), file)): why for file, why in _read_unreadable(run).items()}


def _say_left_out(unreadable: Mapping[str, str], of: int, where: str = "") -> None:
    if unreadable:
        _LOG.info("Unreadable, and left out: %d of %d images%s: %s", len(unreadable), of, where, shown(unreadable))


def _base(data: DataConfig) -> str:
    """The folder that has the files, which may be moved from one start of a run to the next."""
    return os.path.expanduser(data.name.removeprefix("folder:") if data.name.startswith("folder:") else data.root)


@rank_zero_only
def _write_unreadable(run: Path, unreadable: Mapping[str, str]) -> None:
    file = run / "unreadable.json"
    if unreadable:
        with whole_file(file) as path:
            path.write_text(json.dumps(unreadable, indent=2) + "\n")
    else:
        file.unlink(missing_ok=True)  # of a start that came to nothing


def _read_unreadable(run: Path) -> dict[str, str]:
    file = run / "unreadable.json"
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({one_line(error)}): it names the images that the run leaves out"
        ) from error
