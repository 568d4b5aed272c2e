import warnings

import matplotlib.image
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from torch_emc2.diagnostics import GradientError
from torch_emc2.runs.pictures import _OTHER, _QUERY, _SAME, plot_curves, plot_errors, plot_neighbours, thumbnail


def shape(path):
    return matplotlib.image.imread(path).shape[:2]


def pixels_of(path, colour):
    """How many pixels of the picture have a colour such as "#2e9e5b"."""
    picture = (matplotlib.image.imread(path)[..., :3] * 255).round()
    return int((picture == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum())


def test_one_panel_for_each_number_that_was_logged(tmp_path):
    rows = [{"step": t, "train/global_loss": 5 - t, "train/acceptance": 0.5} for t in range(3)] + [
        {"step": 2, "lr-Adam": 1e-4}
    ]
    plot_curves(rows, tmp_path / "three.png")
    plot_curves([{"epoch": 0, "global_loss": 1.0, "validation": 2.0}], tmp_path / "one.png")
    assert shape(tmp_path / "three.png") == (420, 3 * 525)
    assert shape(tmp_path / "one.png") == (420, 525)


def test_csv_of_lightning_draws_the_same_picture(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    rows = [{"global_loss": 5.0, "acceptance": 0.5}, {"lr-Adam": 1e-4}, {"global_loss": 4.0, "acceptance": 0.25}]
    for step, row in enumerate(rows):
        logger.log_metrics(row, step)
    logger.save()
    plot_curves(tmp_path / "metrics.csv", tmp_path / "csv.png")
    plot_curves([{"step": step, **row} for step, row in enumerate(rows)], tmp_path / "rows.png")
    np.testing.assert_array_equal(
        matplotlib.image.imread(tmp_path / "csv.png"), matplotlib.image.imread(tmp_path / "rows.png")
    )


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"columns \['step', 'validation'\]; log one of global_loss"):
        plot_curves([{"step": 0, "validation": 1.0}], tmp_path / "none.png")


def test_frames_tell_whether_labels_agree(tmp_path):
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    neighbours = [[image, image], [image, image]]
    plot_neighbours([image, image], neighbours, ["cat", "dog"], [["cat", "dog"], ["cat", "cat"]], tmp_path / "n.png")
    same, other = pixels_of(tmp_path / "n.png", _SAME), pixels_of(tmp_path / "n.png", _OTHER)
    assert same > 500
    assert other / same == pytest.approx(3, rel=0.1)  # one of the four agrees
    plot_neighbours([image, image], neighbours, None, None, tmp_path / "plain.png")
    assert pixels_of(tmp_path / "plain.png", _SAME) == pixels_of(tmp_path / "plain.png", _OTHER) == 0


def test_colours_of_images_are_kept(tmp_path):
    red = torch.tensor([200, 10, 30], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    grey = torch.full((1, 4, 4), 77, dtype=torch.uint8)
    plot_neighbours([red], [[grey]], None, None, tmp_path / "n.png")
    assert pixels_of(tmp_path / "n.png", "#c80a1e") > 5000
    assert pixels_of(tmp_path / "n.png", "#4d4d4d") > 5000


def test_images_of_all_sizes_and_channels_stand_side_by_side(tmp_path):
    images = [torch.zeros(c, h, w, dtype=torch.uint8) for c, h, w in ((1, 1, 1), (3, 5, 90), (1, 60, 2), (3, 8, 8))]
    plot_neighbours(images[:1], [images[1:]], None, None, tmp_path / "n.png")
    assert shape(tmp_path / "n.png") == (150, 630)


def test_labels_are_drawn_as_they_are(tmp_path):
    """Names of folders may hold anything: no mathematics, no new lines, no script that the font must have."""

    def drawn(name):
        image = torch.zeros(1, 8, 8, dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot_neighbours([image], [[image]], [name], [[name]], tmp_path / "n.png")
        return pixels_of(tmp_path / "n.png", _SAME), (tmp_path / "n.png").read_bytes()

    frame, _ = drawn("plain")
    for name in ("$x_$", "a\nb\nc\nd\ne", "猫", "\udcff"):
        assert drawn(name)[0] == frame  # the label is one line, and leaves the image its place
    assert drawn("x" * 300) == drawn("x" * 15 + "…")


def test_thumbnails_are_means_of_squares(tmp_path):
    image = torch.randint(256, (3, 300, 511), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(thumbnail(image), image)
    large = image[:, :200, :256].repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    assert torch.equal(thumbnail(large), image[:, :200, :256])
    assert thumbnail(image[:, :1].repeat(1, 1, 20)).shape == (3, 1, 262)


@pytest.mark.parametrize(
    ("queries", "neighbours", "labels", "neighbour_labels"),
    [
        (0, [], None, None),
        (2, [1], None, None),
        (2, [1, 2], None, None),
        (1, [2], ["a"], [["a"]]),
        (1, [1], ["a", "b"], [["a"]]),
        (1, [1], ["a"], None),
    ],
)
def test_lists_that_do_not_fit(queries, neighbours, labels, neighbour_labels, tmp_path):
    image = torch.zeros(1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="give each query equally many"):
        plot_neighbours(
            [image] * queries, [[image] * k for k in neighbours], labels, neighbour_labels, tmp_path / "n.png"
        )


def test_errors_at_the_parameters_have_a_panel_of_their_own(tmp_path):
    error = GradientError([1, 2, 4], [0.4, 0.2, 0.1], 0.0, 0.0, 0.4)
    plot_errors({"DCL": error, "EMC²": error}, tmp_path / "one.png")
    both = GradientError([1, 2, 4], [0.4, 0.2, 0.1], 0.0, 0.0, 0.4, {}, error)
    plot_errors({"DCL": both, "EMC²": both}, tmp_path / "two.png")
    assert shape(tmp_path / "one.png") == (570, 900)
    assert shape(tmp_path / "two.png") == (570, 1500)
    assert pixels_of(tmp_path / "one.png", _QUERY) > 50  # the guide
