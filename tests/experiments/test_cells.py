"""Cells: what is finished is kept, what was cut off is done again, and every experiment runs from end to end."""

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from torch_emc2.config import Config
from torch_emc2.experiments import cells as running
from torch_emc2.experiments import definitions
from torch_emc2.experiments.cells import Cell, run_cells
from torch_emc2.experiments.definitions import EXPERIMENTS, read_tuned
from torch_emc2.experiments.measure import AccuracyCurve, GradientCurve, read_curve
from torch_emc2.experiments.run import run_experiment
from torch_emc2.locks import only_writer
from torch_emc2.runs import evaluate_run
from torch_emc2.training import train


def cells_of(tiny: Config, *seeds: int, **changes: Any) -> list[Cell]:
    own = replace(tiny, **changes)
    return [Cell("EMC²", 1, replace(own, seed=seed), "accuracy", 1, 200, "test") for seed in seeds]


def at_work(folder: Path) -> set[int]:
    """Give the processes that log to files below a folder."""
    found = set()
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            if output.readlink().is_relative_to(folder):
                found.add(int(output.parts[2]))
    return found


def once_training(cell: Path) -> set[int]:
    """Wait for a cell's first epoch, and give its processes."""
    deadline = time.monotonic() + 300
    while not (cell / "log.txt").exists() or "Epoch 1" not in (cell / "log.txt").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return at_work(cell)


def assert_gone(folder: Path, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while left := at_work(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as source:
        return list(csv.DictReader(source))


def test_finished_cells_are_kept_and_cut_off_ones_done_again(tiny: Config, tmp_path: Path) -> None:
    cells, folder, results = cells_of(tiny, 0, 1), tmp_path / "cells", tmp_path / "results.csv"
    first = run_cells(cells, folder, 2, results)
    row = folder / cells[0].key / "row.json"
    kept = row.stat().st_mtime_ns
    (folder / cells[1].key / "row.json").unlink()  # as a kill leaves it: a folder, and no row
    (folder / cells[1].key / "curve.csv").write_text("half")
    again = run_cells([*cells, *cells_of(tiny, 2)], folder, 2, results)
    assert row.stat().st_mtime_ns == kept
    assert [r["seed"] for r in again] == [0, 1, 2]
    for one, other in zip(first, again, strict=False):
        assert one["cell"] == other["cell"]
        assert one["probe"] == other["probe"]  # the same run, whoever was killed meanwhile
    assert read_curve(folder / cells[1].key / "curve.csv")[-1]["probe"] == first[1]["probe"]
    assert [row["cell"] for row in table(results)] == [row["cell"] for row in again]
    assert all(float(row["seconds"]) > 0 and float(row["peak_memory_mb"]) > 100 for row in table(results))


def test_two_at_the_same_cell_take_turns(tiny: Config, tmp_path: Path) -> None:
    (cell,) = cells_of(tiny, 0)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_cells, [cell], tmp_path / "cells", 1, tmp_path / f"{i}.csv") for i in range(2)]
    first, second = (run.result() for run in runs)
    assert first == second  # to the second of the one run
    assert len(list((tmp_path / "cells").glob("*/row.json"))) == 1


@pytest.mark.parametrize("given", ["1", "2", "0", "", "999"])
def test_the_user_says_how_many_threads(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    cores = os.cpu_count() or 1
    assert running._threads() == {"1": 1, "2": min(2, cores)}.get(given, cores)


def test_a_key_depends_on_all_that_the_numbers_depend_on(tiny: Config) -> None:
    (cell,) = cells_of(tiny, 0)
    assert replace(cell, series="another", config=replace(tiny, out="elsewhere")).key == cell.key
    others = [
        replace(cell, config=replace(tiny, temperature=0.2)),
        replace(cell, part="validation"),
        replace(cell, labelled=None),
        replace(cell, points=2),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 5


def test_a_failed_cell_is_named_and_the_others_are_kept(tiny: Config, tmp_path: Path) -> None:
    good, bad = cells_of(tiny, 0)[0], cells_of(tiny, 0, batch_size=1000)[0]
    with pytest.raises(ValueError, match=r"1 of 2 cells failed.*log\.txt: .*do not fill one global batch of 1000"):
        run_cells([bad, good], tmp_path, 1, tmp_path / "results.csv")
    assert [row["cell"] for row in table(tmp_path / "results.csv")] == [good.key]


def test_a_killed_experiment_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch_emc2", "experiment", "burn-in", "--dataset", "digits", "--scale", "smoke"]
    command += ["--seeds", "0", "--out", str(tmp_path)]
    cells = tmp_path / "digits-smoke" / "cells"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (done := list(cells.glob("*/row.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert done, "no cell was finished in time"
    assert_gone(tmp_path)  # the cells are in groups of their own, and end with the experiment
    written = {file: file.stat().st_mtime_ns for file in done}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert {file: file.stat().st_mtime_ns for file in done} == written
    rows = table(tmp_path / "digits-smoke" / "burn-in" / "results.csv")
    assert [row["x"] for row in rows] == ["0.0", "0.25", "0.5", "0.75", "0.9"]
    assert len({row["cell"] for row in rows}) == 5


def test_a_curve_ends_with_the_runs_evaluation(tiny: Config) -> None:
    curve = AccuracyCurve(tiny, points=2, labelled=None, part="test")
    run = train(tiny, callbacks=[curve])
    assert [row["step"] for row in curve.rows] == [4, 8]
    assert [row["samples"] for row in curve.rows] == [64, 128]
    final = evaluate_run(run)[0].numbers["trained"]
    shared = ("probe", "knn1_euclidean", "knn10_euclidean", "knn1_cosine", "knn10_cosine")
    assert {name: curve.rows[-1][name] for name in shared} == {name: final[name] for name in shared}


def test_the_validation_part_is_no_part_of_the_test(tiny: Config) -> None:
    validation, test = (AccuracyCurve(tiny, 1, None, part) for part in ("validation", "test"))  # type: ignore[arg-type]
    used = {int(row) for part in validation.parts for row in part.rows}
    assert used == {int(row) for row in test.parts[0].rows}
    assert used.isdisjoint(int(row) for row in test.parts[1].rows)
    assert len(validation.parts[1]) == pytest.approx(0.2 * len(used), abs=1)


def test_classes_of_any_size_are_measured_and_no_classes_refused(tiny: Config, tmp_path: Path) -> None:
    def folder(*names: str) -> Config:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / name)
        return replace(tiny, data=replace(tiny.data, name=f"folder:{tmp_path / names[0].split('/')[0]}"))

    few = folder(*(f"few/{name}/{i}.png" for name, count in (("a", 9), ("b", 4), ("c", 1)) for i in range(count)))
    train, held = AccuracyCurve(few, 1, None, "validation").parts
    assert train.labels is not None
    assert held.labels is not None
    assert torch.bincount(train.labels, minlength=3).min() > 0
    assert 2 not in held.labels
    strange = folder(*(f"strange/{name}/0.png" for name in ("train/a", "train/b", "test/a", "test/c")))
    known = AccuracyCurve(strange, 1, None, "test").parts[1]
    assert known.labels is not None
    assert known.labels.tolist() == [0]  # c has no training image
    half = folder(*(f"half/{name}.png" for name in ("train/a/0", "train/b/0", "test/0", "test/1")))
    for part in ("validation", "test"):
        with pytest.raises(ValueError, match="half gives no accuracies: the "):
            AccuracyCurve(half, 1, None, part)  # type: ignore[arg-type]


def test_exact_numbers_along_a_run_are_those_of_plain_autograd(tiny: Config, tmp_path: Path) -> None:
    config = replace(
        tiny,
        data=replace(tiny.data, finite_views=2, limit=20, root=str(tmp_path)),
        model=replace(tiny.model, norm="none"),
        batch_size=5,
        epochs=1,
    )
    seen = []

    class Plain(L.Callback):
        """The same numbers with one graph over everything."""

        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            own = [p.grad.clone() for p in module.encoder.parameters()]
            views = trainer.datamodule.dataset.views.take(torch.arange(40))  # type: ignore[attr-defined]
            with torch.enable_grad():
                z = F.normalize(module.encoder(views), dim=1)
                logits = z @ z.T / config.temperature
                sample = torch.arange(40) // 2
                negatives = logits.masked_fill(sample[:, None] == sample, -torch.inf).logsumexp(1)
                loss = (negatives - logits[torch.arange(40), torch.arange(40) ^ 1]).mean()
                exact = torch.autograd.grad(loss, list(module.encoder.parameters()))
            error = sum(float((a - b).square().sum()) for a, b in zip(own, exact, strict=True))
            seen.append((loss.item(), sum(float(g.square().sum()) for g in exact), error))

    curve = GradientCurve(points=4)
    train(config, callbacks=[Plain(), curve])
    got = [(row["loss"], row["gradient"], row["error"]) for row in curve.rows]
    assert len(got) == 4
    for mine, plain in zip(got, seen, strict=True):
        assert mine == pytest.approx(plain, rel=1e-3, abs=1e-6)
    assert curve.rows[0]["collapsed"] == pytest.approx(math.log(38))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_from_end_to_end(name: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all methods once; else two cells of EMC² alone: which there are is tested with the definitions."""
    experiment = EXPERIMENTS[name]
    if name != "small-batch":
        alone = {"EMC²": definitions.methods()["EMC²"]}
        monkeypatch.setattr(definitions, "methods", lambda: alone)
        first_two = replace(experiment, variants=lambda base, tuned: islice(experiment.variants(base, tuned), 2))
        monkeypatch.setitem(EXPERIMENTS, name, first_two)
    folder = run_experiment(
        name, dataset="digits", scale="smoke", seeds=[0], jobs=2, out=results, overrides=["--data.root", str(results)]
    )
    rows = table(folder / "results.csv")
    assert len({(row["series"], row["x"], row["seed"]) for row in rows}) == len(rows) > 0
    finished = {
        file.parent.name: json.loads(file.read_text()) for file in results.glob("digits-smoke/cells/*/row.json")
    }
    for row in rows:
        numbers = finished[row["cell"]]
        assert all(row[key] == str(value) for key, value in numbers.items())
        assert all(math.isfinite(value) for value in numbers.values() if isinstance(value, float))
    assert (folder / "table.md").read_text().count("\n| ") == len(rows) + 1
    assert (folder / "table.md").read_text().startswith(f"{experiment.title}; digits")
    assert "a smoke test, no result. digits, scale smoke" in (folder / "table.md").read_text()
    if name == "gradient-study":
        assert "; digits, 256 images;" in (folder / "table.md").read_text()
    assert (folder / "figure.png").stat().st_size > 10_000
    if name == "search":
        best = read_tuned(folder / "best.yaml")
        for series, fields in best.items():
            own = [row for row in rows if row["series"] == series]
            top = max(own, key=lambda row: float(row["probe"]))
            assert top["x"] == f"lr {fields['optimizer.lr']:g}, temperature {fields['temperature']:g}"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("small-batch", ["--batch_size", "16"]),
        ("burn-in", ["--emc2.burn-in=0.3", "--emc2.kernel=metropolis"]),
        ("batch-size", ["--loss", "dcl"]),
        ("burn-in", ["--emc2.burn_in=0.3", "--emc2.kernel=metropolis"]),
        ("carry", ["--seed", "3"]),
        ("gradient-study", ["--optimizer.lr", "0.1"]),
    ],
)
def test_a_field_that_the_experiment_sets_is_refused(name: str, overrides: list[str], tmp_path: Path) -> None:
    field = overrides[0].partition("=")[0].replace("burn-in", "burn_in")
    with pytest.raises(ValueError, match=f"{field} is what {name} sets for its runs itself"):
        run_experiment(name, dataset="digits", scale="smoke", out=tmp_path, overrides=overrides)
    assert not list(tmp_path.iterdir())


def test_a_cell_that_is_killed_has_failed_and_leaves_the_others(tiny: Config, tmp_path: Path) -> None:
    good, bad = cells_of(tiny, 0)[0], cells_of(tiny, 1, accelerator="cpu", epochs=50_000)[0]
    run_cells([good], tmp_path, 1, tmp_path / "results.csv")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_cells, [good, bad], tmp_path, 1, tmp_path / "results.csv")
        for process in once_training(tmp_path / bad.key):
            os.kill(process, signal.SIGKILL)
        with pytest.raises(ValueError, match="1 of 2 cells failed, the others are kept"):
            running.result(timeout=60)
    assert [row["cell"] for row in table(tmp_path / "results.csv")] == [good.key]


def test_ctrl_c_ends_all_cells_and_their_workers(tiny: Config, tmp_path: Path) -> None:
    cells = cells_of(tiny, 0, 1, epochs=50_000, data=replace(tiny.data, num_workers=1))
    interrupted, seen = [], set()

    def ctrl_c() -> None:
        try:
            for cell in cells:
                seen.update(once_training(tmp_path / cell.key))
        finally:
            interrupted.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)  # the parent alone

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children ignore it
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ctrl_c)
            with pytest.raises(KeyboardInterrupt, match="0 of 2 runs are finished, the same command goes on"):
                run_cells(cells, tmp_path, 2, tmp_path / "results.csv")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - interrupted[0] < 10
    assert len(seen) >= 4  # a worker each, at least
    assert_gone(tmp_path, 1)


def test_a_terminals_ctrl_c_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch_emc2", "experiment", "burn-in", "--dataset", "digits", "--scale", "smoke"]
    command += ["--seeds", "0", "--out", str(tmp_path), "--data.num_workers", "1"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not list(tmp_path.glob("digits-smoke/cells/*/run/metrics.csv")) and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "emc2: interrupted; 0 of 5 runs are finished, the same command goes on\n"
    assert_gone(tmp_path)


def test_a_run_that_is_gone_on_with_by_hand_is_kept(tiny: Config, tmp_path: Path) -> None:
    (cell,) = cells_of(tiny, 0)
    file = tmp_path / cell.key / "run" / "metrics.csv"
    with only_writer(file.parent):
        file.write_text("step")
        with pytest.raises(
            ValueError, match=rf"log\.txt: BlockingIOError: .*run is in use by process {os.getpid()} on"
        ):
            run_cells([cell], tmp_path, 1, tmp_path / "results.csv")
        assert file.read_text() == "step"


def test_what_is_no_search_is_refused(tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text(yaml.safe_dump([1, 2]))
    with pytest.raises(ValueError, match=r"is not a search's best\.yaml"):
        read_tuned(tmp_path / "best.yaml")
    for text, words in (("a: [", "is not YAML"), ("DCL: {temperature: hot}", "must be a number, got 'hot'")):
        (tmp_path / "best.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_tuned(tmp_path / "best.yaml")
    with pytest.raises(ValueError, match="no experiment 'figure-9'; there are search, small-batch"):
        run_experiment("figure-9")
    with pytest.raises(ValueError, match="tuned names methods \\['MoCo'\\]; there are InfoNCE"):
        run_experiment("search", tuned={"MoCo": {}})
    with pytest.raises(ValueError, match="no scale 'huge'; there are smoke, small, full"):
        run_experiment("search", scale="huge")
