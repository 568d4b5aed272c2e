"""What can be set of images: what is refused, and what is meant."""

from pathlib import Path
from typing import Any

import pytest

from torch_emc2.data import datasets
from torch_emc2.settings.images import DATA_SETS, Augmentation, Decoding, parse_range, require_data


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"size": 1}, "got 1"),
        ({"flip": 1.5}, "flip .* got 1.5"),
        ({"grey_p": -0.1}, "grey_p .* got -0.1"),
        ({"crop_scale": (0.5, 0.2)}, r"crop_scale .*0.5, 0.2"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"jitter": (0.1, 0.1, 0.1, 0.6)}, "hue at most 0.5"),
        ({"jitter": (-0.1, 0.1, 0.1, 0.1)}, "jitter"),
    ],
)
def test_wrong_augmentations_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Augmentation(**{"size": 32} | wrong)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"background": "whitish"}, "background must be a colour, .* got 'whitish'"),
        ({"background": "#ffffff00"}, "got '#ffffff00'"),
        ({"value_range": "4095"}, "value_range must be as 0,4095 or 1%,99%, .* got '4095'"),
        ({"value_range": "5,5"}, "got '5,5'"),
        ({"value_range": "9,5"}, "got '9,5'"),
        ({"value_range": "1%,99"}, "got '1%,99'"),
        ({"value_range": "1%,101%"}, "got '1%,101%'"),
        ({"max_pixels": 0}, "max_pixels must be at least 1, got 0"),
        ({"shrink_to": 0}, "shrink_to must be at least 1 pixel, or None for all of them, got 0"),
    ],
)
def test_wrong_decodings_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Decoding(**wrong)


def test_ranges_are_of_values_or_of_each_images_percentiles() -> None:
    assert parse_range("0,4095") == (0, 4095, False)
    assert parse_range(" -1e3 , 3000.5") == (-1000, 3000.5, False)
    assert parse_range("1%, 99.5%") == (1, 99.5, True)


def test_data_sets_are_those_that_can_be_opened(tmp_path: Path) -> None:
    assert {*DATA_SETS} == {*datasets._WITHOUT_FILES, "imagenet100"}
    for name in (*DATA_SETS, f"folder:{tmp_path}"):
        require_data(name)
    for name in ("mnist", "", "digits ", f"folder:{tmp_path / 'no'}", "folder:", "folder:a\0b", str(tmp_path)):
        with pytest.raises(ValueError, match=r"unknown data set|is not a folder"):
            require_data(name)
