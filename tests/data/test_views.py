import colorsys
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from torch_emc2.data import RandomView, evaluation_transform, seeded_view, view_seed, views
from torch_emc2.data.views import _blurred, reflected_taps, shift_hue
from torch_emc2.settings.images import Augmentation

integers = st.integers(0, 2**40)


def _image(channels, height, width=None):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (channels, height, width or height), dtype=torch.uint8, generator=generator)


def _reference(a, image):
    """The same draws through torchvision's own transforms on float images."""
    image = tvf.to_dtype(v2.RandomResizedCrop(a.size, scale=a.crop_scale)(image), torch.float32, scale=True)
    if a.flip and torch.rand(1) < a.flip:
        image = tvf.horizontal_flip(image)
    if a.jitter_p and torch.rand(1) < a.jitter_p:
        image = v2.ColorJitter(*a.jitter)(image)
    if a.grey_p and torch.rand(1) < a.grey_p:
        image = tvf.rgb_to_grayscale(image, num_output_channels=len(image))
    if a.blur_p and torch.rand(1) < a.blur_p:
        width = max(3, a.size // 10 | 1)
        image = tvf.gaussian_blur(image, [width, width], [torch.empty(1).uniform_(*a.blur_sigma).item()])
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 64])
@pytest.mark.parametrize(
    "settings", [{}, {"jitter": (0.4, 0.4, 0.2, 0.1), "blur_p": 0.5}, {"jitter_p": 0, "flip": 0, "blur_p": 0}]
)
def test_view_equals_torchvisions(channels, size, settings):
    augmentation, image = Augmentation(size, **settings), _image(channels, 40, 50)
    for index in range(25):
        view = seeded_view(RandomView(augmentation), image, 1, 2, index, 0)
        expected = seeded_view(lambda x: _reference(augmentation, x), image, 1, 2, index, 0)
        torch.testing.assert_close(view, expected, atol=2e-5, rtol=0)
        assert view.dtype == torch.float32
        assert view.min() >= 0
        assert view.max() <= 1


@settings(deadline=None)
@given(st.tuples(*[st.floats(0, 1)] * 3), st.floats(-0.5, 0.5))
def test_hue_against_colorsys(color, turn):
    hue, saturation, value = colorsys.rgb_to_hsv(*color)
    expected = torch.tensor(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), dtype=torch.float64)
    turned = shift_hue(torch.tensor(color, dtype=torch.float64).view(3, 1, 1), turn)
    torch.testing.assert_close(turned.flatten(), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 28, 96])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_against_torchvision(size, sigma):
    image, width = torch.rand(3, size, size), max(3, size // 10 | 1)
    expected = tvf.gaussian_blur(image, [width, width], [sigma, sigma])
    torch.testing.assert_close(_blurred(image, reflected_taps(size, width), sigma), expected, atol=1e-6, rtol=0)


def test_all_off_is_a_resized_crop_alone():
    image = _image(3, 16)
    plain = RandomView(Augmentation(16, crop_scale=(1, 1), flip=0, jitter_p=0, grey_p=0, blur_p=0))
    whole = [i for i in range(400) if torch.equal(seeded_view(plain, image, 0, 0, i, 0), image / 255)]
    assert whole  # a crop of the whole image, drawn with aspect 1, changes nothing
    flipped = RandomView(Augmentation(16, crop_scale=(1, 1), flip=1, jitter_p=0, grey_p=0, blur_p=0))
    assert torch.equal(seeded_view(flipped, image, 0, 0, whole[0], 0), image.flip(-1) / 255)


def test_grey_always():
    view = seeded_view(RandomView(Augmentation(16, grey_p=1.0)), _image(3, 20), 0, 0, 0, 0)
    assert torch.equal(view[0], view[1])
    assert torch.equal(view[0], view[2])


@settings(max_examples=30, deadline=None)
@given(integers, integers, integers, st.integers(0, 3))
def test_view_depends_on_its_key_alone_and_leaves_no_trace(seed, epoch, index, view):
    transform, image = RandomView(Augmentation(12)), _image(3, 12)
    torch.manual_seed(view)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = seeded_view(transform, image, seed, epoch, index, view)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    torch.rand(5)
    assert torch.equal(seeded_view(pickle.loads(pickle.dumps(transform)), image, seed, epoch, index, view), first)
    for other in ((seed + 1, epoch, index, view), (seed, epoch + 1, index, view), (seed, epoch, index + 1, view)):
        assert not torch.equal(seeded_view(transform, image, *other), first)
    assert not torch.equal(seeded_view(transform, image, seed, epoch, index, view + 1), first)


def test_random_state_is_put_back_after_an_error():
    def broken(image):
        torch.rand(1)
        raise RuntimeError("broken")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        seeded_view(broken, _image(1, 8), 0, 0, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_low_half_of_seeds_is_well_mixed():
    keys = [(s, e, i, v) for s in range(2) for e in range(8) for i in range(2048) for v in range(3)]
    seeds = np.array([view_seed(*key) for key in keys], dtype=np.uint64)
    low = seeds & np.uint64(0xFFFFFFFF)  # all that the CPU generator takes
    n = len(keys)
    assert len(np.unique(seeds)) == n
    assert n - len(np.unique(low)) < 5 + 3 * n**2 / 2**33  # birthday collisions
    bits = (low[:, None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / n**0.5
    flips = np.array(
        [view_seed(3, e, i, 1) ^ view_seed(3, e, i + 1, 1) for e in range(4) for i in range(500)], np.uint64
    )
    assert np.bitwise_count(flips).mean() == pytest.approx(32, abs=0.5)


def test_evaluation_keeps_the_right_size_and_resizes_small_ones():
    image = _image(3, 96)
    assert torch.equal(evaluation_transform(96)(image), image / 255)
    small = evaluation_transform(32)(_image(1, 28))
    assert torch.equal(small, v2.Resize((32, 32))(_image(1, 28)) / 255)


def test_evaluation_cuts_the_middle_out_of_large_images():
    image = _image(3, 300, 400)
    expected = v2.CenterCrop(224)(v2.Resize(256)(image)) / 255
    view = pickle.loads(pickle.dumps(evaluation_transform(224)))(image)
    assert view.shape == (3, 224, 224)
    assert torch.equal(view, expected)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (1000, 130), (130, 1040)])
def test_evaluation_of_ordinary_shapes_cuts_no_ends_off(height, width):
    image = _image(3, height, width)
    assert torch.equal(evaluation_transform(224)(image), v2.CenterCrop(224)(v2.Resize(256)(image)) / 255)


@pytest.mark.parametrize("length", [2000, 2001, 3999])
@pytest.mark.parametrize("short", [40, 41])
def test_evaluation_of_long_thin_images_is_their_middle(length, short):
    wave = 127.5 + 127 * torch.sin(torch.arange(length) / 15)
    image = (wave.repeat(short, 1) - torch.arange(short)[:, None] / 2).clamp(0, 255).to(torch.uint8)[None]
    for turned in (image, image.mT):
        whole = v2.CenterCrop(224)(v2.Resize(256)(turned)) / 255
        assert (evaluation_transform(224)(turned) - whole).abs().max() <= 3 / 255  # of 4 a half pixel of the image


def test_evaluation_takes_memory_of_the_size_not_of_the_shape(monkeypatch):
    resized = []
    resize = views.tvf.resize
    monkeypatch.setattr(views.tvf, "resize", lambda *a, **k: resized.append(resize(*a, **k)) or resized[-1])
    for shape in ((1, 10_000), (10_000, 1), (3, 100_000), (10_000, 7)):
        assert evaluation_transform(224)(_image(1, *shape)).shape == (1, 224, 224)
    assert max(image.numel() for image in resized) <= 10 * 256**2
