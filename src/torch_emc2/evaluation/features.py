"""Features of a whole data set, in its order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from torch_emc2.seeds import own_generator

__all__ = ["Images", "extract_features", "raw_pixels"]


class Images(Protocol):
    """What this package asks of a data set."""

    def __len__(self) -> int: ...

    def image(self, index: int, /) -> Tensor:
        """Return one image, uint8 (c, h, w)."""
        ...


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    dataset: Images,
    transform: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    progress: bool = False,
) -> Tensor:
    """Encode every image of a data set.

    Args:
        encode: images (b, c, s, s) on `device` -> features (b, d). A module, or a method of one such as
            `encoder.features`, is in evaluation mode for the while; any other callable sees to its modes itself.
        dataset: the images.
        transform: uint8 (c, h, w) -> float (c, s, s), the same size for every image.
        batch_size: images encoded at once; the features do not depend on it.
        device: where `encode` wants its images.
        num_workers: processes that read and transform.
        progress: show a bar, on a terminal.

    Returns:
        Features (n, d), float32, on the CPU, row i for image i.
    """
    images = _Transformed(dataset, transform)
    batches = DataLoader(images, batch_size=batch_size, num_workers=num_workers, generator=own_generator())
    with _evaluating(encode):
        shown = tqdm(batches, "Embedding", leave=False, delay=1, disable=None if progress else True)
        return torch.cat([encode(images.to(device)).float().cpu() for images in shown])


def raw_pixels(images: Tensor) -> Tensor:
    """Flatten images (b, c, s, s), shrunk to 32 pixels a side where they are larger: (b, c*s*s), without an encoder."""
    return adaptive_avg_pool2d(images, min(images.shape[-1], 32)).flatten(1)


class _Transformed(Dataset[Tensor]):
    def __init__(self, dataset: Images, transform: Callable[[Tensor], Tensor]) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.dataset.image(index))


@contextmanager
def _evaluating(encode: Callable[[Tensor], Tensor]) -> Iterator[None]:
    owner = getattr(encode, "__self__", encode)
    modes = [(module, module.training) for module in owner.modules()] if isinstance(owner, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
