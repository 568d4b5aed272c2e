import matplotlib.image
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger

from torch_emc2.diagnostics import GradientError
from torch_emc2.runs.pictures import _GUIDE, _running_mean, plot_curves, plot_errors


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
    assert shape(tmp_path / "three.png") == (450, 3 * 525)
    assert shape(tmp_path / "one.png") == (450, 525)
    names = ("global_loss", "positive_similarity", "acceptance", "carried_share", "lr")
    plot_curves([{"step": t, **dict.fromkeys(names, 0.5)} for t in range(3)], tmp_path / "five.png")
    assert shape(tmp_path / "five.png") == (2 * 450, 3 * 525)  # three and two, not four and one


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


def test_errors_at_the_parameters_have_a_panel_of_their_own(tmp_path):
    error = GradientError([1, 2, 4], [0.4, 0.2, 0.1], 0.0, 0.0, 0.4)
    plot_errors({"DCL": error, "EMC²": error}, tmp_path / "one.png")
    both = GradientError([1, 2, 4], [0.4, 0.2, 0.1], 0.0, 0.0, 0.4, {}, error)
    plot_errors({"DCL": both, "EMC²": both}, tmp_path / "two.png")
    assert shape(tmp_path / "one.png") == (570, 900)
    assert shape(tmp_path / "two.png") == (570, 1500)
    assert pixels_of(tmp_path / "one.png", _GUIDE) > 50  # the guide


def test_the_running_mean_is_that_of_the_values_around():
    values = np.random.default_rng(0).normal(size=50)
    by_hand = [np.mean(values[max(0, i - 2) : i + 3]) for i in range(50)]
    np.testing.assert_allclose(_running_mean(values, 5), by_hand)


def test_many_noisy_points_are_pale_beside_their_mean(tmp_path):
    rows = [{"step": t, "global_loss": (-1.0) ** t, "lr": 1.0} for t in range(100)]
    plot_curves(rows, tmp_path / "many.png")
    plot_curves(rows[:30], tmp_path / "few.png")
    line = "#3b6ea8"
    assert pixels_of(tmp_path / "few.png", line) > 2 * pixels_of(tmp_path / "many.png", line) > 1000
