"""The images of a run: checked before it starts, and the same ones whenever it goes on or is looked at."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from torch_emc2.config import Config, DataConfig, read_config
from torch_emc2.data import BadImageError, DataError, FileImages, ImageDataset, check_files, open_dataset, shown
from torch_emc2.data.datasets import Split
from torch_emc2.data.decode import FULL_16_BIT
from torch_emc2.files import one_line, whole_file

__all__ = ["evaluation_parts", "first_images", "given_range", "same_images"]

_LOG = logging.getLogger(__name__)


def first_images(config: Config, run: Path) -> tuple[Config, ImageDataset]:
    """Return the images that a new run trains on, and its config with the range of their values.

    All images of its data set are looked at. ``unreadable.json`` in the run's folder names those that cannot be read;
    they are left out, or stop it.

    Raises:
        BadImageError: some cannot be read, and are not to be skipped.
        DataError: the images are not there, or too few of them can be read, or the range of their values is not known.
    """
    data = config.data
    images = _open(data, "train", config.seed)
    files = [path for i in range(len(images)) if (path := images.path(i)) is not None]
    if not files:
        return config, images
    if data.name.startswith("folder:"):  # evaluation will want its test part
        test = _open(data, "test", config.seed)
        files = sorted({*files, *(str(test.path(i)) for i in range(len(test)))})
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
    assert isinstance(images.source, FileImages)  # no other has files
    images.source.decoding = decoding
    return replace(config, data=replace(data, value_range=decoding.value_range)), _readable(images, unreadable, 2)


def same_images(config: Config, run: Path) -> tuple[Config, ImageDataset]:
    """Return what `first_images` returned when the run began."""
    data = config.data
    if data.value_range is None and (run / "config.yaml").is_file():
        data = replace(data, value_range=read_config(str(run / "config.yaml")).data.value_range)
        config = replace(config, data=data)
    return config, _open(data, "train", config.seed).without(_left_out(data, run))


def evaluation_parts(config: Config, run: Path, *, own: bool = True) -> tuple[ImageDataset, ImageDataset]:
    """Return what a probe of a data set is fitted on, and what it is tested on.

    Unreadable images stop it, or are left out, as in training. They are sought in both parts together: a range of deep
    values is that of both.

    Args:
        config: the run's; its data set may be another.
        run: the run's folder.
        own: it is the run's data set: what the run left out at its start stays so.

    Raises:
        BadImageError: some cannot be read, and are not to be skipped.
        DataError: the images are not there, or none of a part can be read.
    """
    data = config.data
    train, test = (
        open_dataset(data.name, split, Path(data.root), channels=data.channels, decoding=data.decoding)
        for split in ("probe", "test")
    )
    files = {path for part in (train, test) for i in range(len(part)) if (path := part.path(i)) is not None}
    if not files:
        return train, test
    left_out = {file: why for file, why in _left_out(data, run).items() if file in files} if own else {}
    skip, look = data.on_bad_image == "skip", sorted(files - left_out.keys())
    check = check_files(look, data.decoding, whole=skip, num_workers=data.num_workers, kept=run / "checked.json")
    decoding, unreadable = check.resolve(data.decoding)
    if unreadable and not skip:
        setting = f"data.on_bad_image: skip in {run / 'config.yaml'}"
        raise BadImageError(check.refusal(f"mend or remove them, or leave them out by {setting}", "--value-range"))
    unreadable = left_out | unreadable
    _say_left_out(unreadable, len(files))
    for part in (train, test):
        assert isinstance(part.source, FileImages)
        part.source.decoding = decoding
    return _readable(train, unreadable, 1), _readable(test, unreadable, 1)


def given_range(data: DataConfig) -> str | None:
    """Return the range of a run's deep values that holds for other images than its own: not one that was found."""
    return None if data.value_range == FULL_16_BIT else data.value_range


def _readable(images: ImageDataset, unreadable: Mapping[str, str], least: int) -> ImageDataset:
    """Leave out the unreadable ones, if enough are left."""
    left = images.without(unreadable)
    if len(left) < least:
        named = {file: why for i in range(len(images)) if (why := unreadable.get(file := str(images.path(i))))}
        raise DataError(
            f"{len(left)} of {len(images)} images can be read, at least {least} are needed: {shown(named)}: mend them"
        )
    return left


def _open(data: DataConfig, split: Split, seed: int) -> ImageDataset:
    return open_dataset(
        data.name,
        split,
        Path(data.root),
        channels=data.channels,
        limit=data.limit,
        seed=seed,
        decoding=data.decoding,
    )


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
