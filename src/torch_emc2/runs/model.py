"""A run's encoder to use from Python, with all that an image goes through before it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize as unit

from torch_emc2.data import (
    BadImageError,
    Check,
    DataError,
    ImageDataset,
    check_files,
    decode_image,
    evaluation_transform,
    find_images,
    image_pixels,
    shown,
)
from torch_emc2.error_text import one_line
from torch_emc2.evaluation import extract_features
from torch_emc2.runs.finished import load_run
from torch_emc2.settings.images import Decoding

__all__ = ["Givable", "Model"]

Givable: TypeAlias = str | os.PathLike[str] | Image.Image | Tensor | np.ndarray | Iterable["Givable"]
"""Files and folders of images, images of Pillow, uint8 (c, h, w) or (n, c, h, w), c of 1 or 3; or several of these."""

_BATCH = 256


class Model:
    """A finished run's encoder, in evaluation mode.

    Args:
        run: the run's folder.
        device: where it computes; by default a GPU where there is one and the run's accelerator allows it.
        value_range: of values deeper than 8 bits; by default the run's, unless that was found in its images.

    Attributes:
        run: the run's folder.
        config: its settings.
        encoder: the backbone and its head.
        device: where the encoder is.
        decoding: what becomes of files' pixels.

    Raises:
        ValueError: the folder is no finished run, or its files are damaged.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        value_range: str | None = None,
    ) -> None:
        self.run = Path(os.path.expanduser(run))
        self.config, self.encoder, self.device = load_run(self.run, device)
        self.decoding = replace(self.config.data.decoding, value_range=value_range or self.config.data.value_range)

    def embed(self, images: Givable, *, batch_size: int = _BATCH, normalize: bool = False) -> Tensor:
        """Embed images: what a probe of the run sees of each, float32 (n, d) on the CPU.

        Rows are in the order of what is given; those of a folder are of all images below it, in order of their names,
        as `torch_emc2.data.find_images` lists them. On a terminal a bar shows work that takes long.

        Args:
            images: files, folders, images of Pillow, uint8 tensors or arrays; or a list of these.
            batch_size: images encoded at once; the embeddings do not depend on it.
            normalize: give rows the length 1, so that their products are cosines.

        Raises:
            DataError: there is no image, or what is given is none.
            BadImageError: one cannot be read; `images` leaves such out.
        """
        return self.features(self.images(images), batch_size=batch_size, normalize=normalize)

    def images(self, images: Givable, *, on_bad_image: Literal["raise", "skip"] = "raise") -> ImageDataset:
        """Return images as the encoder takes them, those in files checked, for `features`; see `embed`.

        Args:
            images: as for `embed`.
            on_bad_image: "skip" leaves out files that cannot be read; ``.files()`` names those that are left, in order.
        """
        given = list(_given(images, "images"))
        if not given:
            raise DataError("no images: give files, or folders that hold some, images of Pillow, or uint8 (c, h, w)")
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image must be 'raise' or 'skip', got {on_bad_image!r}")
        files = [image for image in given if isinstance(image, str)]
        check = self.check(files, whole=on_bad_image == "skip")
        decoding, unreadable = check.resolve(self.decoding)
        if unreadable and on_bad_image == "raise":
            advice = "mend or remove them (in Python, model.images(…, on_bad_image='skip') leaves them out)"
            raise BadImageError(check.refusal(advice, "value_range"))
        given = [image for image in given if not (isinstance(image, str) and image in unreadable)]
        if not given:
            raise DataError(f"none of the images can be read: {shown(unreadable)}")
        return ImageDataset(_GivenImages(given, decoding))

    def features(self, images: ImageDataset, *, batch_size: int = _BATCH, normalize: bool = False) -> Tensor:
        """Embed a data set, float32 (n, d)."""
        features = extract_features(
            self.encoder.features,
            images.converted(self.encoder.channels),
            evaluation_transform(self.encoder.image_size),
            batch_size=batch_size,
            device=self.device,
            num_workers=self._workers(len(images)),
            progress=True,
        )
        return unit(features, dim=1) if normalize else features

    def check(self, files: Sequence[str], *, whole: bool = False) -> Check:
        """Look at files that are to be embedded; ``whole``: decode all of them."""
        return check_files(files, self.decoding, whole=whole, num_workers=self._workers(len(files)))

    @cached_property
    def identity(self) -> str:
        """A hash of the weights, and of what they are weights of: the same wherever the run's folder is."""
        digest = hashlib.sha256()
        for part in ("encoder", "head"):
            with (self.run / f"{part}.safetensors").open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _workers(self, images: int) -> int:
        return self.config.data.num_workers if images > _BATCH else 0  # which take longer to start than a few images


class _GivenImages:
    """Images in files and in memory, in the order in which they are given."""

    channels = 3

    def __init__(self, images: Sequence[str | Image.Image | Tensor], decoding: Decoding) -> None:
        self.images, self.decoding = images, decoding

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> Tensor:
        image = self.images[row]
        if isinstance(image, Tensor):
            return image
        if isinstance(image, str):
            return decode_image(image, self.decoding)
        try:
            return image_pixels(image, self.decoding)
        except Exception as error:  # Pillow's parsers raise whatever a damaged file makes of them
            raise BadImageError(f"cannot read image {row} of those given, {image} ({one_line(error)})") from error

    def path(self, row: int) -> str | None:
        image = self.images[row]
        return image if isinstance(image, str) else None


def _given(images: Givable, name: str) -> Iterable[str | Image.Image | Tensor]:
    """Give what is given one image after the other, files by their names."""
    if isinstance(images, str | os.PathLike):
        path = Path(os.path.expanduser(images))
        found = find_images(path)
        if not found.files:
            raise DataError(f"no images in {str(path)!r}: give images, or folders that hold some. {found}".rstrip())
        yield from found.files
    elif isinstance(images, Image.Image):
        yield images
    elif isinstance(images, Tensor | np.ndarray):
        kind = str(images.dtype).removeprefix("torch.")
        if kind != "uint8" or images.ndim not in (3, 4) or images.shape[-3] not in (1, 3):
            raise DataError(
                f"{name} is {kind} of shape {tuple(images.shape)}: give uint8 (c, h, w) or (n, c, h, w), c of 1 or 3; "
                "an array (h, w, c) as Image.fromarray(array)"
            )
        pixels = images.cpu() if isinstance(images, Tensor) else torch.from_numpy(images.copy())
        yield from pixels.reshape(-1, *pixels.shape[-3:])
    elif isinstance(images, Iterable):
        for i, image in enumerate(images):
            yield from _given(image, f"{name}[{i}]")
    else:
        kind = type(images).__name__
        raise DataError(
            f"{name} is of type {kind}: give a path, an image of Pillow, uint8 (c, h, w), or a list of these"
        )
