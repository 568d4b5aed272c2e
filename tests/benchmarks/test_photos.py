"""benchmarks/photos.py: what stands beside a run is what its line says."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from photos import score


def test_raw_pixels_are_those_of_the_files(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grey 8 x 8 images, as the run takes: of Twitter's some are Google's, a little noisy, and lighter."""
    rng, drawings = np.random.default_rng(0), {}
    for part, count in (("train", 5), ("validation", 3), ("test", 20)):
        google = rng.integers(60, 180, (count, 8, 8))
        twitter = google + rng.integers(-60, 60, google.shape) + 15
        for vendor, images in (("google", google), ("twitter", twitter)):
            (tmp_path / part / vendor).mkdir(parents=True)
            for i, image in enumerate(images):
                Image.fromarray(image.astype(np.uint8)).save(tmp_path / part / vendor / f"{i:02}.png")
            drawings[part, vendor] = images.reshape(count, -1) / 255
    score(tmp_path / "test", finished)
    lines = capsys.readouterr().out.splitlines()[-3:]
    queries = drawings["test", "google"] - drawings["test", "google"].mean(0)
    every = np.concatenate([drawings[part, "twitter"] for part in ("train", "validation", "test")])
    every = every - every.mean(0)
    cosines = queries @ every.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(every, axis=1)
    among_all = np.mean(cosines.argmax(1) == np.arange(8, 28))
    within = np.mean(cosines[:, 8:].argmax(1) == np.arange(20))
    assert 0 < among_all <= within
    assert re.findall(r"[.\d]+ among \d+", lines[2]) == [f"{within:.3f} among 20", f"{among_all:.3f} among 28"]
    assert len({line.split(maxsplit=1)[0] for line in lines}) == 3
