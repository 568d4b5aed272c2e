import os
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from torch_emc2.data import BadImageError, decode_image
from torch_emc2.settings.images import Decoding


def _on(colours, alpha, background):
    """Colours (h, w, 3) over a background, in real numbers, to the nearest integer."""
    share = alpha[..., None].astype(np.float64) / 255
    return np.floor(colours * share + np.array(background) * (1 - share) + 0.5).astype(np.uint8)


def _decoded(path, **fields):
    return decode_image(path, Decoding(**fields)).permute(1, 2, 0).numpy()


def _png(width, height, depth, kind, rows, *chunks):
    """A PNG of raw rows, filter bytes included."""
    body = b"".join(_png_chunk(*chunk) for chunk in [*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + body


# --- modes ------------------------------------------------------------------------------------------------------------


def test_rgb_png_is_read_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(decode_image(tmp_path / "a.png"), torch.from_numpy(pixels.transpose(2, 0, 1)))


def test_sixteen_bits_that_fill_their_range_are_scaled(tmp_path):
    values = np.array([[0, 128, 129, 257 * 100, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = torch.tensor([[0, 0, 1, 100, 128, 255]], dtype=torch.uint8)  # round(v * 255 / 65535)
    assert torch.equal(decode_image(tmp_path / "a.png"), expected.expand(3, 1, 6))
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "a.tif")
    given = Decoding(value_range="0,65535")
    assert torch.equal(decode_image(tmp_path / "a.tif", given), expected.expand(3, 1, 6))


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, color, expected):
    Image.new(mode, (4, 3), color).save(tmp_path / "a.png")
    assert torch.equal(
        decode_image(tmp_path / "a.png"), torch.tensor(expected, dtype=torch.uint8).view(3, 1, 1).expand(3, 3, 4)
    )


def test_palette_and_cmyk(tmp_path):
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "p.png")
    assert decode_image(tmp_path / "p.png")[:, 0, 0].tolist() == [9, 8, 7]
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "c.jpg", quality=100)
    red, green, blue = decode_image(tmp_path / "c.jpg")[:, 8, 8].tolist()  # cyan ink reflects all but red
    assert (red, green, blue) == pytest.approx((0, 255, 255), abs=2)


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 255  # right half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = decode_image(tmp_path / "a.jpg")
    assert image.shape == (3, 32, 16)
    assert image[:, :12].max() < 10  # what was left is on top
    assert image[:, 20:].min() > 245


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("#ff0000", "#0000ff")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


def _png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _bad_files(folder):
    """Files that are no images, by name."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    (folder / "whole.jpg").unlink()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "überraschung 猫.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    os.symlink(folder / "gone.png", folder / "broken.png")
    bomb = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", bomb) + _png_chunk(b"IDAT", b""))
    Image.fromarray(np.ones((3, 3), dtype=np.float32)).save(folder / "float.tif")
    return sorted(file for file in folder.iterdir())


def test_bad_files_raise_one_line_that_names_them(tmp_path):
    for file in _bad_files(tmp_path):
        with pytest.raises(BadImageError) as caught:
            decode_image(file)
        assert file.name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_heic_is_named_with_what_opens_it(tmp_path):
    for name in ("a.heic", "b.jpg"):  # phones name them so too
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
        with pytest.raises(
            BadImageError, match=r"\(HEIC, which Pillow opens after: python -m pip install pillow-heif\)"
        ):
            decode_image(tmp_path / name)


def test_other_programs_are_not_asked(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(BadImageError, match="of no kind that Pillow opens here"):
        decode_image(tmp_path / "a.png")


def test_larger_images_are_refused_by_their_header(tmp_path):
    (tmp_path / "a.png").write_bytes(_png(40000, 40000, 8, 2, b""))
    with pytest.raises(BadImageError, match=r"\(40000 x 40000 pixels are more than max_pixels, 67108864\)"):
        decode_image(tmp_path / "a.png")
    Image.new("L", (5, 4), 7).save(tmp_path / "b.png")
    with pytest.raises(BadImageError, match="5 x 4 pixels are more than max_pixels, 19"):
        decode_image(tmp_path / "b.png", Decoding(max_pixels=19))
    assert decode_image(tmp_path / "b.png", Decoding(max_pixels=20)).unique().tolist() == [7]


def test_the_limit_is_ours_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # Pillow's own raises above twice that, and warns below
    Image.new("L", (5, 4), 7).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png").shape == (3, 4, 5)
    assert Image.MAX_IMAGE_PIXELS == 4


# --- transparency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("background", "rgb"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_alpha_lies_on_the_background(tmp_path, background, rgb):
    rng = np.random.default_rng(0)
    every = np.stack(np.meshgrid(np.arange(256), np.arange(256)), -1).astype(np.uint8)  # all greys at all alphas
    grey, alpha = every[..., 0], every[..., 1]
    colours = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    expected = _on(colours, alpha, rgb)
    for kind in ("png", "tif"):
        Image.fromarray(np.dstack([colours, alpha])).save(tmp_path / f"rgba.{kind}")
        assert np.array_equal(_decoded(tmp_path / f"rgba.{kind}", background=background), expected)
    Image.fromarray(np.dstack([colours, alpha])).save(tmp_path / "rgba.webp", lossless=True, exact=True)
    assert np.array_equal(_decoded(tmp_path / "rgba.webp", background=background), expected)
    Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))).save(tmp_path / "la.png")
    assert np.array_equal(_decoded(tmp_path / "la.png", background=background), _on(np.dstack([grey] * 3), alpha, rgb))


def test_palettes_with_alpha(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (4, 3), dtype=np.uint8)
    alphas, which = np.array([0, 90, 200, 255], np.uint8), np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    rows = b"".join(b"\0" + bytes(row) for row in which.tolist())
    chunks = [(b"PLTE", colours.tobytes()), (b"tRNS", alphas.tobytes())]
    (tmp_path / "several.png").write_bytes(_png(4, 2, 8, 3, rows, *chunks))
    assert np.array_equal(_decoded(tmp_path / "several.png"), _on(colours[which], alphas[which], (255, 255, 255)))
    (tmp_path / "first.png").write_bytes(_png(4, 2, 8, 3, rows, chunks[0], (b"tRNS", b"\0")))
    opaque = np.where(which == 0, 0, 255)
    assert np.array_equal(_decoded(tmp_path / "first.png"), _on(colours[which], opaque, (255, 255, 255)))
    image = Image.fromarray(which.astype(np.uint8))
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "first.gif", transparency=0)
    assert np.array_equal(_decoded(tmp_path / "first.gif"), _on(colours[which], opaque, (255, 255, 255)))


@pytest.mark.parametrize(
    ("depth", "rows", "key", "values"),
    [
        (1, b"\0\xa0", 1, [255, 0, 255, 0]),
        (2, b"\0\x1b", 2, [0, 85, 170, 255]),
        (4, b"\0\x01\x2f", 1, [0, 17, 34, 255]),
        (8, b"\0\x00\x01\x11\xff", 1, [0, 1, 17, 255]),
        (16, b"\0\x00\x00\x00\x01\x80\x00\xff\xff", 1, [0, 0, 128, 255]),
    ],
)
def test_one_grey_of_a_png_is_transparent(tmp_path, depth, rows, key, values):
    (tmp_path / "a.png").write_bytes(_png(4, 1, depth, 0, rows, (b"tRNS", struct.pack(">H", key))))
    stored = int.from_bytes(rows[1:], "big")
    samples = [stored >> (8 * (len(rows) - 1) - depth * (i + 1)) & (2**depth - 1) for i in range(4)]
    expected = [255 if sample == key else value for sample, value in zip(samples, values, strict=True)]
    assert key in samples
    assert _decoded(tmp_path / "a.png")[0, :, 0].tolist() == expected


def test_one_colour_of_a_png_is_transparent(tmp_path):
    rows = b"\0" + bytes([1, 2, 3, 1, 2, 4, 9, 9, 9])
    (tmp_path / "a.png").write_bytes(_png(3, 1, 8, 2, rows, (b"tRNS", b"\0\1\0\2\0\3")))
    assert _decoded(tmp_path / "a.png", background="#0a0b0c")[0].tolist() == [[10, 11, 12], [1, 2, 4], [9, 9, 9]]


def test_what_pillow_warns_of_is_not_passed_on(tmp_path, recwarn):
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(tmp_path / "a.png", transparency=b"\xff\x00")  # "should be converted to RGBA images"
    assert (_decoded(tmp_path / "a.png") == 255).all()
    assert not recwarn.list


def test_hidden_pixels_are_hidden(tmp_path):
    hidden = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(np.dstack([hidden, np.zeros((6, 6), np.uint8)])).save(tmp_path / "a.png")
    assert (_decoded(tmp_path / "a.png") == 255).all()


# --- values deeper than 8 bits ----------------------------------------------------------------------------------------


def _tiff(folder, values):
    Image.fromarray(values).save(folder / "a.tif")
    return folder / "a.tif"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[0, 4095]], np.uint16), "16-bit values from 0 to 4095"),
        (np.array([[100, 600]], np.uint16), "16-bit values from 100 to 600"),
        (np.array([[0, 32767]], np.uint16), "16-bit values from 0 to 32767"),
        (np.array([[0, 255]], np.int32), "32-bit or signed values from 0 to 255"),
        (np.array([[-1000, 3000]], np.int32), "32-bit or signed values from -1000 to 3000"),
        (np.array([[0.0, 1.0]], np.float32), "floating-point values from 0 to 1"),
    ],
)
def test_values_of_no_known_range_are_refused(tmp_path, values, words):
    with pytest.raises(BadImageError, match=f"{words} have no known range: value_range gives one"):
        decode_image(_tiff(tmp_path, values))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-40000, 70000), min_size=1, max_size=40), st.integers(-5000, 5000), st.integers(1, 70000))
def test_a_given_range_is_scaled_to_eight_bits(tmp_path_factory, values, low, width):
    array = np.array([values], np.int32)
    file = _tiff(tmp_path_factory.getbasetemp(), array)
    got = _decoded(file, value_range=f"{low},{low + width}")[0, :, 0]
    exact = (np.clip(array[0].astype(np.float64), low, low + width) - low) * 255 / width
    assert np.abs(got - exact).max() <= 0.5 + 1e-9


def test_a_range_keeps_all_levels_of_twelve_bits_that_eight_can(tmp_path):
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    got = _decoded(_tiff(tmp_path, values), value_range="0,4095")[..., 0]
    assert len(np.unique(got)) == 256
    assert (np.diff(got.flatten().astype(int)) >= 0).all()


def test_percentiles_are_each_images_own(tmp_path):
    for scale in (1, 7):
        values = (scale * np.arange(101) + 500).astype(np.uint16)[None]
        got = _decoded(_tiff(tmp_path, values), value_range="10%,90%")[0, :, 0]
        expected = np.clip((np.arange(101) - 10) / 80, 0, 1) * 255
        assert np.abs(got - expected).max() <= 0.5 + 1e-9
    constant = np.full((3, 3), 900, np.uint16)
    assert (_decoded(_tiff(tmp_path, constant), value_range="1%,99%") == 0).all()


def test_floating_point_values_take_a_range_too(tmp_path):
    values = np.array([[-1.0, 0.0, 0.5, 1.0, 2.0]], np.float32)
    assert _decoded(_tiff(tmp_path, values), value_range="0,1")[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(BadImageError, match="not finite"):
        decode_image(_tiff(tmp_path, np.array([[np.nan, 1]], np.float32)), Decoding(value_range="0,1"))


def test_eight_bits_and_scaled_ones_know_their_range(tmp_path):
    Image.fromarray(np.array([[3, 200]], np.uint8)).save(tmp_path / "a.png")
    assert _decoded(tmp_path / "a.png", value_range="0,4095")[0, :, 0].tolist() == [3, 200]
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095))  # names its maximum
    for value_range in (None, "0,4095"):
        assert _decoded(tmp_path / "a.pgm", value_range=value_range)[0, :, 0].tolist() == [0, 128, 255]


def test_sixteen_bit_colour_that_fills_its_range_is_taken(tmp_path):
    def colour(*samples, kind=2):
        rows = b"\0" + struct.pack(f">{len(samples)}H", *samples)
        (tmp_path / "a.png").write_bytes(_png(1, 1, 16, kind, rows))
        return tmp_path / "a.png"

    assert _decoded(colour(256 * 7, 256 * 9, 65535))[0, 0].tolist() == [7, 9, 255]
    for dark in (colour(7, 9, 4095), colour(7, 9, 4095, 65535, kind=6), colour(4095, 65535, kind=4)):
        with pytest.raises(BadImageError, match=r"16-bit colour values from .* have no known range"):
            decode_image(dark)
    with pytest.raises(BadImageError, match="scale it to 8 bits"):
        decode_image(colour(7, 9, 65535), Decoding(value_range="0,4095"))


# --- shrinking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize(("width", "height", "size"), [(640, 320, (64, 32)), (330, 640, (32, 62)), (32, 40, (32, 40))])
def test_larger_images_are_shrunk_to_a_shorter_side(tmp_path, kind, width, height, size):
    """Of a smooth picture each pixel is near the mean of those that it stands for, however it is shrunk."""
    across, down = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
    smooth = np.stack([127 + 100 * np.sin(across), 127 + 100 * np.cos(down), 127 + 50 * np.sin(across + down)], 2)
    Image.fromarray(smooth.round().astype(np.uint8)).save(tmp_path / f"a.{kind}", quality=95)
    shrunk = _decoded(tmp_path / f"a.{kind}", shrink_to=32)
    assert shrunk.shape == (size[1], size[0], 3)
    rows, columns = (np.linspace(0, n, m + 1).round().astype(int) for n, m in ((height, size[1]), (width, size[0])))
    means = [[smooth[a:b, c:d].mean((0, 1)) for c, d in pairwise(columns)] for a, b in pairwise(rows)]
    assert np.abs(shrunk - np.array(means))[1:-1, 1:-1].max() < 12


def test_photographs_are_shrunk_before_they_are_turned_and_after_they_lie_on_the_background(tmp_path):
    photo = Image.new("RGB", (200, 100), "red")
    photo.paste("blue", (100, 0, 200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    for kind in ("jpg", "tif", "png"):
        photo.save(tmp_path / f"a.{kind}", exif=exif, quality=95)
        for shrink_to, (height, width) in ((10, (20, 10)), (None, (200, 100))):
            upright = _decoded(tmp_path / f"a.{kind}", shrink_to=shrink_to)
            assert upright.shape == (height, width, 3)
            assert np.abs(upright[height // 10, width // 2] - np.array([255, 0, 0])).max() < 12
            assert np.abs(upright[-height // 10, width // 2] - np.array([0, 0, 255])).max() < 12
    holes = np.zeros((40, 40, 4), np.uint8)
    holes[:, ::2] = 200, 100, 50, 255  # what is transparent is black, and must not be seen
    Image.fromarray(holes).save(tmp_path / "b.png")
    mixed = _decoded(tmp_path / "b.png", background="white", shrink_to=10)[2:-2, 2:-2]
    assert np.abs(mixed - np.array([227.5, 177.5, 152.5])).max() < 3


def test_a_shrunk_jpeg_is_not_decoded_whole(tmp_path, monkeypatch):
    Image.new("RGB", (1600, 800)).save(tmp_path / "a.jpg")
    loaded, load = [], JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda file: loaded.append(file.size) or load(file))
    _decoded(tmp_path / "a.jpg", shrink_to=50)
    assert set(loaded) == {(200, 100)}  # twice what is needed
