"""Random views of many images at once, on any device: draws of the same law as one view's at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_emc2.data.views import reflected_taps, shift_hue
from torch_emc2.seeds import scrambled, shifted
from torch_emc2.settings.images import Augmentation

__all__ = ["BatchedViews", "Draws"]

_TRIES = 10  # at a crop that fits, as torchvision's
_RATIO = 3 / 4, 4 / 3
_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114


_Crops = tuple[Tensor, Tensor, Tensor, Tensor]


class Draws(NamedTuple):
    """What n views are drawn with, on the CPU.

    Attributes:
        top: (n,) int64 first line that is cut out.
        left: likewise.
        height: of the crop.
        width: likewise.
        flip: (n,) bool, mirrored.
        jitter: (n,) bool.
        factors: (n, 4) of brightness, contrast and saturation; the turn of the hue.
        order: (n, 4) which of these comes at each place.
        grey: (n,) bool.
        blur: (n,) bool.
        sigma: (n,) of the blur.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor


class BatchedViews:
    """Draws views as `Augmentation` says, each a function of its image and its seed."""

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation
        self.taps = reflected_taps(augmentation.size, augmentation.blur_width)

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return a view of each of the images, uint8 (n, c, h, w): float32 (n, c, size, size) in [0, 1]."""
        return self.apply(images, self.draw(seeds, images.shape[-2], images.shape[-1]))

    def draw(self, seeds: Sequence[int], height: int, width: int) -> Draws:
        """Draw for images of one size."""
        a = self.augmentation
        u = _uniform(seeds, 2 * _TRIES + 16)
        crop = _crops(u[:, : 2 * _TRIES].view(-1, _TRIES, 2), u[:, -16:-14], a.crop_scale, height, width)
        amounts = torch.tensor(a.jitter)
        low = torch.cat([(1 - amounts[:3]).clamp_min(0), -amounts[3:]])
        high = torch.cat([1 + amounts[:3], amounts[3:]])
        flip, jitter, grey, blur = (u[:, -14:-10] < torch.tensor([a.flip, a.jitter_p, a.grey_p, a.blur_p])).unbind(1)
        sigma = a.blur_sigma[0] + u[:, -10] * (a.blur_sigma[1] - a.blur_sigma[0])
        factors, order = low + u[:, -8:-4] * (high - low), u[:, -4:].argsort(1)
        return Draws(*crop, flip, jitter, factors.float(), order, grey, blur, sigma.float())

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Make the views that were drawn, on the images' device."""
        size, device = self.augmentation.size, images.device
        top, left, height, width = (part.to(device) for part in draws[:4])
        rows, columns = _resizing(top, height, images.shape[-2], size), _resizing(left, width, images.shape[-1], size)
        columns = torch.where(draws.flip.to(device)[:, None, None], columns.flip(1), columns)
        views = rows[:, None] @ (images.float() / 255) @ columns[:, None].mT
        self._jitter(views, draws)
        if views.shape[1] == 3:
            for chosen in _chosen(draws.grey):
                at = chosen.to(device)
                views[at] = _grey(views[at]).expand(-1, 3, -1, -1)
        for chosen in _chosen(draws.blur):
            at, lines = chosen.to(device), self._blurring(draws.sigma[chosen].to(device))[:, None]
            views[at] = lines @ views[at] @ lines.mT
        return views.clamp_(0, 1)

    def _jitter(self, views: Tensor, draws: Draws) -> None:
        """Change colours in place, each view's in its own order."""
        amounts = self.augmentation.jitter
        known = [kind for kind in range(4) if amounts[kind] and (views.shape[1] == 3 or kind < 2)]
        for place in range(4):
            for kind in known:
                for chosen in _chosen(draws.jitter & (draws.order[:, place] == kind)):
                    at, factor = chosen.to(views.device), draws.factors[chosen, kind].to(views.device)
                    views[at] = _adjusted(views[at], kind, factor[:, None, None, None])

    def _blurring(self, sigma: Tensor) -> Tensor:
        """Return the matrices (n, size, size) that blur lines."""
        self.taps = self.taps.to(sigma.device)
        width, size, _ = self.taps.shape
        offset = torch.arange(width, device=sigma.device) - width // 2
        weights = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)
        return (weights @ self.taps.flatten(1)).view(-1, size, size)


def _uniform(seeds: Sequence[int], count: int) -> Tensor:
    """Return (n, count) numbers in [0, 1): splitmix64's sequence from each seed."""
    signed = [seed - (1 << 64) if seed >= 1 << 63 else seed for seed in seeds]
    state = torch.tensor(signed, dtype=torch.int64)[:, None] + torch.arange(1, count + 1) * -0x61C8864680B583EB
    return shifted(scrambled(state), 11).double() / (1 << 53)


def _crops(tries: Tensor, place: Tensor, scale: tuple[float, float], height: int, width: int) -> _Crops:
    """Return top, left, height and width (n,) from numbers in [0, 1): (n, tries, 2) of shapes, (n, 2) of places."""
    area = height * width * (scale[0] + tries[..., 0] * (scale[1] - scale[0]))
    low, high = map(math.log, _RATIO)
    ratio = (low + tries[..., 1] * (high - low)).exp()
    widths, heights = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.byte().argmax(1, keepdim=True)
    whole = min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))
    found = fits.any(1)
    starts, sizes = [], []
    for i, (side, lengths, otherwise) in enumerate(((height, heights, whole[0]), (width, widths, whole[1]))):
        length = torch.where(found, lengths.gather(1, first)[:, 0], otherwise)
        starts.append(torch.where(found, (place[:, i] * (side - length + 1)).long(), (side - length) // 2))
        sizes.append(length)
    return starts[0], starts[1], sizes[0], sizes[1]


def _resizing(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Return the matrices (n, size, side) that resize parts of lines with antialiasing, bilinearly."""
    scale = (length / size)[:, None, None]
    centre = scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    pixel = torch.arange(side, device=start.device) - start[:, None, None]
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weight = weight.masked_fill((pixel < 0) | (pixel >= length[:, None, None]), 0)
    return weight / weight.sum(2, keepdim=True)


def _chosen(which: Tensor) -> list[Tensor]:
    """Return the rows (k,) that are chosen, or nothing if there is none."""
    rows = which.nonzero()[:, 0]
    return [rows] if len(rows) else []


def _adjusted(views: Tensor, kind: int, factor: Tensor) -> Tensor:
    """Change brightness, contrast, saturation or hue, by ``kind``."""
    if kind == 3:
        return shift_hue(views, factor)
    if kind == 0:
        return (views * factor).clamp_(0, 1)
    grey = _grey(views)
    other = grey.mean((1, 2, 3), keepdim=True) if kind == 1 else grey
    return torch.lerp(other.expand_as(views), views, factor.expand_as(views)).clamp_(0, 1)


def _grey(views: Tensor) -> Tensor:
    if views.shape[1] == 1:
        return views
    red, green, blue = views.chunk(3, 1)
    return _RED * red + _GREEN * green + _BLUE * blue
