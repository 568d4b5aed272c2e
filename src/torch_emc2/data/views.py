"""Random views of an image, each a function of (seed, epoch, index, view) alone."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from torch_emc2.seeds import mix_seed
from torch_emc2.settings.images import Augmentation, shorter_side

__all__ = [
    "RandomView",
    "Transform",
    "evaluation_transform",
    "reflected_taps",
    "seeded_view",
    "shift_hue",
    "view_seed",
]

Transform = Callable[[Tensor], Tensor]


class RandomView:
    """Maps uint8 (c, h, w), c of 1 or 3, to a random view: float32 (c, size, size) in [0, 1].

    The draws are torchvision's; its kernels are called directly, which saves half of the time on small images.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation
        self.crop = v2.RandomResizedCrop(augmentation.size, scale=augmentation.crop_scale)
        self.jitter = v2.ColorJitter(*augmentation.jitter)
        self.blur_taps = reflected_taps(augmentation.size, augmentation.blur_width)

    def __call__(self, image: Tensor) -> Tensor:
        """Draw one."""
        a = self.augmentation
        image = tvf.resized_crop(image, **self.crop.make_params([image]), size=[a.size, a.size], antialias=True)
        if _happens(a.flip):
            image = image.flip(-1)
        image = image.float() / 255  # uint8 is the faster type for resizing, float for all that follows
        if _happens(a.jitter_p):
            image = self._jittered(image)
        if _happens(a.grey_p):
            image = tvf.rgb_to_grayscale(image, num_output_channels=len(image))
        if _happens(a.blur_p):
            image = _blurred(image, self.blur_taps, torch.empty(()).uniform_(*a.blur_sigma).item())
        return image.clamp(0, 1)  # rounding leaves the range by 1e-7

    def _jittered(self, image: Tensor) -> Tensor:
        drawn = self.jitter.make_params([image])
        steps = (
            (tvf.adjust_brightness, drawn["brightness_factor"]),
            (tvf.adjust_contrast, drawn["contrast_factor"]),
            (tvf.adjust_saturation, drawn["saturation_factor"]),
            (shift_hue, drawn["hue_factor"]),
        )
        for step in drawn["fn_idx"].tolist():
            adjust, amount = steps[step]
            if amount is not None and (len(image) == 3 or step < 2):
                image = adjust(image, amount)
        return image


def _happens(probability: float) -> bool:
    return probability > 0 and torch.rand(()).item() < probability


def shift_hue(image: Tensor, turn: float | Tensor) -> Tensor:
    """Turn the hue, in full turns, at equal HSV value and saturation: (…, 3, h, w) to the same.

    Chroma and maximum stay, so HSV itself is not needed; a third of the time of torchvision's.
    """
    top, low = image.amax(-3, keepdim=True), image.amin(-3, keepdim=True)
    chroma = top - low
    red, green, blue = (image / chroma.clamp_min(1e-12)).chunk(3, -3)
    from_green = torch.where(top == image.narrow(-3, 1, 1), blue - red + 2, red - green + 4)
    sixths = torch.where(top == image.narrow(-3, 0, 1), green - blue, from_green)  # of the circle of hues, from red
    k = (sixths + 6 * turn + torch.tensor([5.0, 3.0, 1.0], device=image.device).view(3, 1, 1)) % 6
    return top - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def reflected_taps(size: int, width: int) -> Tensor:
    """Return (width, size, size): slice t picks, for each pixel of a line, the one t - width // 2 on, mirrored."""
    source = (torch.arange(size) + torch.arange(width)[:, None] - width // 2).abs()
    return nnf.one_hot(size - 1 - (size - 1 - source).abs(), size).float()


def _blurred(image: Tensor, taps: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian, as a product with one matrix from each side: the fastest way at these sizes on a CPU."""
    width, size, _ = taps.shape
    offset = torch.arange(width) - width // 2
    line = (torch.softmax(-0.5 * (offset / sigma) ** 2, dim=0) @ taps.flatten(1)).view(size, size)
    return line @ image @ line.T


def evaluation_transform(size: int) -> Transform:
    """Return what maps uint8 (c, h, w) to float32 (c, size, size) in [0, 1], without chance.

    An image that has that size is kept. Up to 64 pixels others are resized to it; above, the middle is cut out of an
    image whose shorter side is size * 256 / 224; of one that is very long, after its ends were cut off.
    """
    return partial(_evaluation_view, size=size)


def _evaluation_view(image: Tensor, size: int) -> Tensor:
    if image.shape[-2:] != (size, size):
        if (shorter := shorter_side(size)) is None:
            image = tvf.resize(image, [size, size], antialias=True)
        else:
            image = tvf.center_crop(tvf.resize(_middle(image), [shorter], antialias=True), [size, size])
    return image.float() / 255


def _middle(image: Tensor) -> Tensor:
    """Cut an image to at most eight times as long as wide, or one pixel more, around the same middle."""
    for side in (-2, -1):
        length, widest = image.shape[side], 8 * min(image.shape[-2:])
        if length > widest:
            kept = widest + (length - widest) % 2
            image = image.narrow(side, (length - kept) // 2, kept)
    return image


def view_seed(seed: int, epoch: int, index: int, view: int) -> int:
    """Return the 64-bit seed of one view."""
    return mix_seed(seed, epoch, index, view)


def seeded_view(transform: Transform, image: Tensor, seed: int, epoch: int, index: int, view: int) -> Tensor:
    """Transform an image with torch's CPU generator seeded by `view_seed`; its state is put back afterwards."""
    generator = torch.default_generator  # torch.manual_seed would seed every GPU too
    state = generator.get_state()
    try:
        generator.manual_seed(view_seed(seed, epoch, index, view))
        return transform(image)
    finally:
        generator.set_state(state)
