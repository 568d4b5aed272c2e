"""Data sets by name."""

from __future__ import annotations

import gzip
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from torch_emc2.data.errors import DataError
from torch_emc2.data.folders import ImageFolder, find_images, read_folder
from torch_emc2.data.hub import read_hub
from torch_emc2.data.images import ArrayImages, FileImages, ImageDataset, RecordImages
from torch_emc2.error_text import one_line
from torch_emc2.held_out import held_out_fifth
from torch_emc2.settings.images import Decoding, require_data

__all__ = ["Split", "open_dataset", "open_splits"]

_LOG = logging.getLogger(__name__)

Split = Literal["train", "probe", "test"]

_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def open_dataset(
    name: str,
    split: Split,
    root: Path,
    *,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    decoding: Decoding = Decoding(),  # noqa: B008  # frozen
) -> ImageDataset:
    """Open the images of a data set that are trained on, probed with labels, or tested on.

    A folder's classes are the folders that hold its images; images that all lie directly in it have no labels. Its
    splits are known by their usual names (``train/`` and ``test/``, ``valid/``, …); of a test and a validation part the
    first is "test", and neither is trained on. Where it has none, "train" is all images and "test" a fixed random
    fifth of each class (of a class of one image, none), "probe" the rest. What was understood goes to the log.

    Args:
        name: digits, fashion-mnist, cifar10, stl10, imagenet100, folder:PATH for any tree of images, or hf:OWNER/NAME
            or hf:PATH for what Hugging Face's `datasets` loads.
        split: "train" is pre-trained on, "probe" has the labels that a probe is fitted on, "test" tests.
        root: where all others but digits are looked for; Fashion-MNIST, CIFAR-10 and STL-10 are downloaded to it.
        channels: 1 or 3, to which every image is converted; None keeps the data set's own.
        limit: "train" is a random subset of at most so many images.
        seed: of that choice.
        decoding: what is made of files' pixels.

    Raises:
        DataError: no such data set or split, or its files are not there or damaged.
    """
    (dataset,) = open_splits(name, (split,), root, channels=channels, limit=limit, seed=seed, decoding=decoding)
    return dataset


def open_splits(
    name: str,
    splits: Sequence[Split],
    root: Path,
    *,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    decoding: Decoding = Decoding(),  # noqa: B008  # frozen
) -> list[ImageDataset]:
    """Open several splits of a data set, as `open_dataset` opens one; a folder is walked once."""
    if unknown := set(splits) - set(get_args(Split)):
        raise DataError(f"unknown split {', '.join(map(repr, unknown))}; use one of {', '.join(get_args(Split))}")
    if limit is not None and limit < 2:
        raise DataError(f"limit must be at least 2, got {limit}: a lone image has no negatives")
    part = _parts(name, _expanded(root), decoding)
    opened = []
    for split in splits:
        dataset = part(split)
        if split == "train" and limit is not None:
            generator = torch.Generator().manual_seed(seed)
            dataset = dataset.subset(torch.randperm(len(dataset), generator=generator)[:limit].sort().values)
        opened.append(dataset.converted(channels or dataset.channels))
    return opened


def _parts(name: str, root: Path, decoding: Decoding) -> Callable[[Split], ImageDataset]:
    """Return what opens a split of the data set."""
    try:
        require_data(name)
    except ValueError as error:
        raise DataError(str(error)) from error
    if name.startswith("folder:"):
        folder = read_folder(_expanded(name.removeprefix("folder:")))
        _LOG.info("%s", folder)
        return lambda split: _of_folder(folder, split, decoding)
    if name.startswith("hf:"):
        data = read_hub(name)
        _LOG.info("%s", data)
        return lambda split: _part(data.train, data.held_out, split).decoded(decoding)
    if name == "imagenet100":
        return lambda split: _imagenet100(split, root, decoding)
    return lambda split: _WITHOUT_FILES[name](split, root)


def _expanded(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # Path's own raises where there is no such user


def _digits(split: Split, root: Path) -> ImageDataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    dataset = ImageDataset(ArrayImages(images), labels=labels, classes=[str(digit) for digit in range(10)])
    return dataset.subset(_fifth(labels, test=split == "test"))


def _fashion_mnist(split: Split, root: Path) -> ImageDataset:
    from torchvision.datasets import FashionMNIST

    part = "t10k" if split == "test" else "train"
    names = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    own = root / "FashionMNIST" / "raw"

    def find() -> list[Path] | None:
        for folder in (own, _DEBIAN_FASHION_MNIST):
            found = [file for name in names for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
            # A download leaves both forms of a file; either will do.
            chosen = {file.name.removesuffix(".gz"): file for file in reversed(found)}
            if len(chosen) == len(names):
                return [chosen[name] for name in names]
        return None

    found = find()
    if found is None:
        _download(
            lambda target: FashionMNIST(target, download=True),
            Path("FashionMNIST/raw"),
            root,
            f"fashion-mnist: {names[0]}[.gz] and {names[1]}[.gz] are neither in {str(own)!r} nor in "
            f"{str(_DEBIAN_FASHION_MNIST)!r}; put them there, or install Debian's package dataset-fashion-mnist",
        )
        found = [own / name for name in names]
    images, labels = (_read_idx(file) for file in found)
    return ImageDataset(ArrayImages(images[:, None]), labels=labels.long(), classes=FashionMNIST.classes)


def _cifar10(split: Split, root: Path) -> ImageDataset:
    from torchvision.datasets import CIFAR10

    train = split != "test"
    try:
        data = CIFAR10(root, train=train)
    except RuntimeError:  # torchvision's word for files that are missing or have another checksum
        folder = Path(CIFAR10.base_folder)
        _download(
            lambda target: CIFAR10(target, download=True),
            folder,
            root,
            f"cifar10: its files are not in {str(root / folder)!r}, or damaged; unpack {CIFAR10.filename} "
            f"({CIFAR10.url}) in {str(root)!r}",
        )
        data = CIFAR10(root, train=train)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageDataset(ArrayImages(images), labels=torch.tensor(data.targets), classes=data.classes)


def _stl10(split: Split, root: Path) -> ImageDataset:
    from torchvision.datasets import STL10

    folder = Path(STL10.base_folder)
    part = {"train": "unlabeled", "probe": "train", "test": "test"}[split]
    images, labels = root / folder / f"{part}_X.bin", root / folder / f"{part}_y.bin"
    labelled = split != "train"
    missing = [file.name for file in (images, labels)[: 1 + labelled] if not file.is_file()]
    if missing:
        _download(
            lambda target: STL10(target, download=True),
            folder,
            root,
            f"stl10: {' and '.join(missing)} not in {str(root / folder)!r}; unpack {STL10.filename} "
            f"({STL10.url}) in {str(root)!r}",
        )
    source = RecordImages(images, size=96)
    if not labelled:
        return ImageDataset(source)
    return ImageDataset(
        source, labels=torch.from_numpy(np.fromfile(labels, np.uint8)).long() - 1, classes=_STL10_CLASSES
    )


def _imagenet100(split: Split, root: Path, decoding: Decoding) -> ImageDataset:
    folder = root / "imagenet" / ("val" if split == "test" else "train")
    wnids = sorted(files("torch_emc2.data").joinpath("imagenet100_wnids.txt").read_text().split())
    tree = {wnid: find_images(folder / wnid).files if (folder / wnid).is_dir() else [] for wnid in wnids}
    missing = [wnid for wnid, found in tree.items() if not found]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"imagenet100: {len(missing)} of {len(wnids)} classes have no images in {str(folder)!r} ({shown}); "
            "put each class's ImageNet-1k images in a folder there named by its WordNet id"
        )
    return _of_files([(file, wnid) for wnid, found in tree.items() for file in found], wnids, decoding)


def _of_folder(folder: ImageFolder, split: Split, decoding: Decoding) -> ImageDataset:
    held_out = None if folder.held_out is None else _of_files(folder.held_out, folder.classes, decoding)
    return _part(_of_files(folder.train, folder.classes, decoding), held_out, split)


def _part(dataset: ImageDataset, held_out: ImageDataset | None, split: Split) -> ImageDataset:
    """Return the split, of images to train on and those that are held out, if any are."""
    if split == "test" and held_out is not None:
        return held_out
    if split == "train" or held_out is not None:
        return dataset
    labels = torch.zeros(len(dataset)) if dataset.labels is None else dataset.labels
    return dataset.subset(_fifth(labels, test=split == "test"))


_WITHOUT_FILES: dict[str, Callable[[Split, Path], ImageDataset]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "stl10": _stl10,
}


def _fifth(labels: Tensor, *, test: bool) -> Tensor:
    """Return the rows of a fixed random fifth of each class, or of the rest, in which no class is missing.

    Where each class has one image no class can be tested; a fifth of all is held out, for what needs no labels.
    """
    if len(torch.unique(labels)) == len(labels):
        labels = torch.zeros(len(labels))
    chosen = held_out_fifth(labels)
    return (chosen if test else ~chosen).nonzero()[:, 0]


def _download(fetch: Callable[[str], object], folder: Path, root: Path, failure: str) -> None:
    """Fetch ``root/folder``; its files appear under their names only once all of them are whole."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".download-", dir=root) as target:
            fetch(target)
            (root / folder).mkdir(parents=True, exist_ok=True)
            for file in (target / folder).iterdir():
                os.replace(file, root / folder / file.name)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(f"{failure} (the download failed: {one_line(error)})") from error


def _read_idx(file: Path) -> Tensor:
    """Read a file in the idx format of MNIST, as uint8."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if data[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        shape = np.frombuffer(data, ">i4", count=data[3], offset=4).tolist()
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"{str(file)!r} is damaged ({one_line(error)}); remove it and fetch it again") from error


def _of_files(listing: Sequence[tuple[str, str]], classes: Sequence[str], decoding: Decoding) -> ImageDataset:
    source = FileImages([file for file, _ in listing], decoding)
    if all(name == "." for _, name in listing):
        return ImageDataset(source)
    number = {name: i for i, name in enumerate(classes)}
    return ImageDataset(source, labels=torch.tensor([number[name] for _, name in listing]), classes=classes)
