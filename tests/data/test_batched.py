"""Views of a batch at once are those that are drawn one at a time, in law."""

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from torch_emc2.data import BatchedViews, RandomView, seeded_view, view_seed
from torch_emc2.data.batched import _uniform
from torch_emc2.settings.images import Augmentation


def _images(count, channels, height, width):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, height // 4, width // 4, generator=generator)
    return (tvf.resize(coarse, [height, width]) * 255).to(torch.uint8)


def _seeds(count, view=0):
    return [view_seed(3, 1, i, view) for i in range(count)]


def test_numbers_are_splitmix64s():
    mask = (1 << 64) - 1
    for seed, row in zip((0, 1, 2**63, mask), _uniform((0, 1, 2**63, mask), 5).tolist(), strict=True):
        for k, number in enumerate(row, 1):
            z = (seed + k * 0x9E3779B97F4A7C15) & mask
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
            z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
            assert number == ((z ^ z >> 31) >> 11) / 2**53
    assert _uniform([0], 1).item() == (0xE220A8397B1DCDAF >> 11) / 2**53  # the published first


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "height", "width"), [(28, 28, 28), (16, 40, 52), (48, 24, 20)])
def test_a_view_is_what_torchvision_makes_of_the_draws(channels, size, height, width):
    images, views = _images(40, channels, height, width), BatchedViews(Augmentation(size, blur_p=0.5))
    draws = views.draw(_seeds(40), height, width)
    got = views.apply(images, draws)
    for image, view, d in zip(images, got, zip(*draws, strict=True), strict=True):
        top, left, h, w, flip, jitter, factors, order, grey, blur, sigma = (each.tolist() for each in d)
        want = tvf.resized_crop(image.float() / 255, top, left, h, w, [size, size], antialias=True)
        want = tvf.horizontal_flip(want) if flip else want
        steps = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
        for step in order if jitter else []:
            if channels == 3 or step < 2:
                want = steps[step](want, factors[step])
        want = tvf.rgb_to_grayscale(want, channels) if grey else want
        want = tvf.gaussian_blur(want, [max(3, size // 10 | 1)] * 2, [sigma] * 2) if blur else want
        torch.testing.assert_close(view, want, atol=3e-5, rtol=0)
    assert got.min() >= 0
    assert got.max() <= 1


@pytest.mark.parametrize(
    ("scale", "height", "width"), [((0.08, 1.0), 96, 96), ((0.3, 1.0), 20, 60), ((0.9, 1.0), 60, 20)]
)
def test_crops_are_drawn_as_torchvisions(scale, height, width):
    count = 20_000
    draws = BatchedViews(Augmentation(8, crop_scale=scale)).draw(_seeds(count), height, width)
    torch.manual_seed(0)
    reference, image = v2.RandomResizedCrop(8, scale=scale), torch.empty(1, height, width)
    drawn = [reference.make_params([image]) for _ in range(count)]
    for name in ("top", "left", "height", "width"):
        assert stats.ks_2samp(getattr(draws, name).numpy(), [each[name] for each in drawn]).pvalue > 1e-3, name
    area = stats.ks_2samp((draws.height * draws.width).numpy(), [each["height"] * each["width"] for each in drawn])
    ratio = stats.ks_2samp(
        (draws.height.double() / draws.width).numpy(), [each["height"] / each["width"] for each in drawn]
    )
    assert min(area.pvalue, ratio.pvalue) > 1e-3


def test_all_else_is_drawn_as_it_says():
    count = 20_000
    a = Augmentation(8, flip=0.3, jitter=(0.4, 2.0, 0.0, 0.1), jitter_p=0.8, grey_p=0.2, blur_p=1, blur_sigma=(0.5, 2))
    draws = BatchedViews(a).draw(_seeds(count), 8, 8)
    for name, p in (("flip", 0.3), ("jitter", 0.8), ("grey", 0.2)):
        assert stats.binomtest(int(getattr(draws, name).sum()), count, p).pvalue > 1e-3, name
    assert draws.blur.all()
    ranges = [(0.6, 1.4), (0.0, 3.0), (1.0, 1.0), (-0.1, 0.1)]
    for factor, (low, high) in zip([*draws.factors.T, draws.sigma], [*ranges, (0.5, 2.0)], strict=True):
        if low < high:
            assert stats.kstest(factor.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3
        else:
            assert (factor == low).all()
    orders = torch.unique(draws.order, dim=0, return_counts=True)[1]
    assert len(orders) == 24
    assert stats.chisquare(orders.numpy()).pvalue > 1e-3
    numbers = [draws.top, draws.flip, draws.jitter, *draws.factors.T[[0, 1, 3]], draws.grey, draws.sigma]
    correlation = torch.corrcoef(torch.stack([each.double() for each in [*numbers, draws.height]])).triu(1)
    correlation[0, -1] = 0  # a large crop has one place
    assert correlation.abs().max() < 5 / count**0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_the_statistics_of_those_one_at_a_time(channels):
    count, augmentation = 3000, Augmentation(16, blur_p=0.5)
    image = _images(1, channels, 32, 24)[0]
    together = BatchedViews(augmentation)(image.expand(count, -1, -1, -1), _seeds(count))
    alone = torch.stack([seeded_view(RandomView(augmentation), image, 3, 1, i, 1) for i in range(count)])
    features = {
        "mean": lambda x: x.mean((1, 2, 3)),
        "contrast": lambda x: x.std((1, 2, 3)),
        "sharpness": lambda x: x.diff(dim=3).abs().mean((1, 2, 3)),
        "slope": lambda x: (x[..., 8:] - x[..., :8]).mean((1, 2, 3)),
        "corner": lambda x: x[:, 0, 0, 0],
        "colour": lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)),
    }
    for name, feature in features.items():
        assert stats.ks_2samp(feature(together).numpy(), feature(alone).numpy()).pvalue > 1e-3, name


def test_a_view_depends_on_its_image_and_seed_alone():
    images, views = _images(20, 3, 24, 24), BatchedViews(Augmentation(16))
    whole = views(images, _seeds(20))
    for some in ([3], [19, 0, 7]):
        part = views(images[some], [_seeds(20)[i] for i in some])
        torch.testing.assert_close(part, whole[some], atol=1e-6, rtol=0)
    assert ((views(images, _seeds(20, view=1)) - whole).abs().amax((1, 2, 3)) > 0.01).all()
    assert views(images[:0], []).shape == (0, 3, 16, 16)
