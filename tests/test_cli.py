"""The command: what it prints, and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import torch_emc2
from outcomes import break_inside
from torch_emc2 import runs
from torch_emc2.cli import _what_next, main
from torch_emc2.cli_arguments import Parser
from torch_emc2.config import Config, presets, read_config, to_yaml
from torch_emc2.training import ContrastiveModule

TINY = [
    "--data.augmentation.size",
    "8",
    "--data.limit",
    "66",
    "--batch_size",
    "16",
    "--epochs",
    "1",
    "--accelerator",
    "cpu",
    "--probe",
    "sgd",
]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["emc2", *argv])
    assert main() == 0
    assert capsys.readouterr().out.startswith("usage: emc2 COMMAND")


WRONG = {
    "learn": "no command 'learn'; there are quickstart, train,",
    "evalute runs": "no command 'evalute': did you mean evaluate?",
    "train nothing": "'nothing' is neither a preset",
    "train used": "nor a YAML file; folder:used trains on a folder's images",
    "train folder:none": "none",
    "train quickstart --batch_size x": "batch_size",
    "train quickstart --batch_size 1": "batch_size must be at least 2, got 1",
    "train quickstart --lss dcl": "there is no field --lss: did you mean --loss?",
    "train quickstart --lr 0.1": "there is no field --lr: did you mean --optimizer.lr?",
    "train quickstart --batchsize=8": "there is no field --batchsize: did you mean --batch_size?",
    "train quickstart --optimiser.lr 1": "there is no field --optimiser.lr: did you mean --optimizer.lr?",
    "train wrong.yaml": "there is no field data.augmentation.sise: did you mean data.augmentation.size?",
    "quickstart --eppochs 1": "there is no field --eppochs: did you mean --epochs?",
    "train quickstart --loss x": "loss must be one of",
    "train quickstart --emc2.kernel gibbs": "gibbs",
    "train quickstart --emc2.carry cached": "cached",
    "train quickstart --model.hidden_dim 0": "hidden_dim must be at least 1, got 0",
    "train quickstart --model.pretrained none.pth": "there is no model.pretrained 'none.pth': give a file of weights",
    "train quickstart --model.pretrained used": "the folder 'used' has no config.json",
    "train quickstart --model.backbone resnet18.a1_in1k": "'resnet18.a1_in1k' names pretrained weights",
    "quickstart --model.pretrained none.pth": "there is no model.pretrained 'none.pth': give a file of weights",
    "train quickstart --optimizer.freeze_epochs 11": "optimizer.freeze_epochs must not exceed epochs (10), got 11",
    "train quickstart --optimizer.backbone_lr_scale -1": "backbone_lr_scale must not be negative, got -1",
    "train quickstart --data.background pinkish": "background must be a colour",
    "train quickstart --data.name cifar11": "unknown data set 'cifar11'; use one of digits, fashion-mnist, cifar10,",
    "train quickstart --data.name folder:nowhere": "'nowhere' is not a folder",
    "train quickstart --devices 0": "devices must be at least 1, or auto for all there are, got 0",
    "train quickstart --data.num_workers -1": "num_workers must be from 0 to 1024, got -1",
    "train quickstart --out used": "used is not empty: --resume goes on",
    "train --loss dcl quickstart": "the preset or YAML file comes first, got --loss",
    "quickstart --devices 2": "quickstart has one device, got 2: emc2 train quickstart takes more",
    "quickstart --data.augmentation.size 1": "size must be at least 2 pixels, got 1",
    "quickstart --data.name folder:nowhere": "'nowhere' is not a folder",
    "presets quickstart --lss dcl": "--lss",
    "presets nothing": "'nothing' is neither a preset",
    "evaluate": "required: run (see emc2 evaluate --help)",
    "evaluate nowhere": "there is no run 'nowhere'",
    "evaluate dome": "there is no run 'dome': did you mean done?",
    "evaluate used": "'used' is not a run's folder",
    "evaluate begun": "the run in 'begun' is not finished: emc2 train begun/config.yaml --resume goes on",
    "evaluate done --data mnist": "unknown data set 'mnist'",
    "evaluate done --value-range 9,1": "value_range must be as 0,4095 or 1%,99%, the lower value first, got '9,1'",
    "evaluate done --baseline-s": "unrecognized arguments: --baseline-s: did you mean --baselines?",
    "evaluate done --value_range 9,1": "value_range must be as 0,4095 or 1%,99%",
    "diagnose done --batch_size 1": "--batch-size: must be a whole number, at least 2, got '1'",
    "diagnose nowhere": "there is no run 'nowhere'",
    "diagnose done --samples 1": "--samples: must be a whole number, at least 2, got '1'",
    "diagnose done --epochs many": "--epochs: must be a whole number, at least 1, got 'many'",
    "embed nowhere used -o out.parquet": "there is no run 'nowhere'",
    "embed done photos -o out.parquet": "there is no 'photos'",
    "embed done used": "required: -o/--out",
    "embed done used -o out.csv": "out.csv will be a Parquet file: give it a name that ends in .parquet",
    "embed done used -o out.parquet --on-bad-image keep": "invalid choice: 'keep'",
    "export nowhere out": "there is no run 'nowhere'",
    "export done": "required: folder",
    "export done out --push me": "--push: must be OWNER/NAME, got 'me'",
    "neighbours done": "required: FOLDER_OR_IMAGE",
    "neighbours done photos": "there is no 'photos'",
    "neighbours done used -k 0": "-k: must be a whole number, at least 1, got '0'",
    "neighbours done used -o n.jpg": "n.jpg will be a PNG: give it a name that ends in .png",
    "duplicates nowhere": "there is no run 'nowhere'",
    "duplicates e.parquet": "there is no 'e.parquet': emc2 embed RUN FOLDER -o e.parquet writes it",
    "duplicates done --threshold 2": "--threshold: must be a cosine, from -1 to 1, got '2'",
    "duplicates done --treshold 0.9": "unrecognized arguments: --treshold 0.9: did you mean --threshold?",
    "map begun": "the run in 'begun' is not finished",
    "experiment chain": "invalid choice: 'chain'",
    "experiment chains --epochs none": "epochs",
    "experiment chains --jobs 0": "--jobs: must be a whole number, at least 1, got '0'",
    "experiment chains --seeds -1": "seeds",
    "experiment chains --dataset mnist": "unknown data set 'mnist'",
    "experiment chains --tuned used/notes.txt": "is not a search's best.yaml",
}
RIGHT = (
    *("--help", "--version", "train --help", "train --help all", "quickstart --help", "evaluate --help", "map --help"),
    *("experiment", "presets", "presets quickstart --epochs 3", "presets quickstart --batch-size 8"),
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """Of each command, all in one process: status, what it wrote to stderr, heavy packages that were imported."""
    folder = tmp_path_factory.mktemp("told")
    for run in ("begun", "done"):
        (folder / run).mkdir()
        (folder / run / "config.yaml").write_text(to_yaml(Config()))
    (folder / "done" / "head.safetensors").touch()
    (folder / "wrong.yaml").write_text("data: {augmentation: {sise: 8}}")
    (folder / "used").mkdir()
    (folder / "used" / "notes.txt").write_text("own")
    code = """
import contextlib, io, json, sys
from torch_emc2.cli import main
heavy = {"torch", "torchvision", "numpy", "timm", "lightning", "sklearn", "numba", "matplotlib", "pyarrow"}
told = {}
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(words.split())
        except SystemExit as stop:
            status = stop.code
    told[words] = status, err.getvalue(), sorted(heavy & {*sys.modules})
print(json.dumps(told))
"""
    words = json.dumps([*WRONG, *RIGHT])
    done = subprocess.run([sys.executable, "-c", code], input=words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "runs").exists()  # nothing is in the way of another try
    result: dict[str, tuple[int, str, list[str]]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_word_is_told_of_in_one_line_before_torch_is_imported(
    words: str, told: dict[str, tuple[int, str, list[str]]]
) -> None:
    status, err, heavy = told[words]
    assert (status, heavy) == (2, [])
    (line,) = err.splitlines()
    assert line.startswith("emc2: error: ")
    assert WRONG[words] in line


@pytest.mark.parametrize("words", RIGHT)
def test_what_only_tells_does_without_torch(words: str, told: dict[str, tuple[int, str, list[str]]]) -> None:
    assert told[words] == [0, "", []]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "quickstart", "--model.backbone", "resnet_18"], "resnet18"),
        (["train", "quickstart", "--accelerator", "abacus"], "abacus"),
        (["train", "quickstart", "--accelerator", "cpu", "--devices", "1000000"], "do not fill one global batch"),
        (["train", "quickstart", "--data.limit", "5"], "5 samples do not fill one global batch of 64"),
        (
            ["experiment", "chains", "--scale", "smoke", "--loss", "dcl"],
            "--loss is what chains sets",
        ),
    ],
)
def test_what_only_the_images_the_machine_or_a_library_can_tell_is_one_line_too(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("emc2: error: ")
    assert message in line
    assert not (tmp_path / "runs").exists()  # nothing is in the way of another try


def test_a_maintainer_sees_where_an_error_was_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMC2_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no run"):
        main(["evaluate", str(tmp_path / "none")])


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(presets())


def test_a_preset_is_printed_as_yaml_to_start_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["presets", "stl10-b32"]) == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    assert read_config(str(tmp_path / "my.yaml")) == read_config("stl10-b32")
    assert main(["presets", "nothing"]) == 2
    capsys.readouterr()
    assert main(["presets", "stl10-b32", "--epochs", "30"]) == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    assert read_config(str(tmp_path / "my.yaml")).epochs == 30
    assert main(["presets", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: emc2 presets")


def test_help_names_all_fields_on_a_screen_and_describes_them_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")

    def told(*argv: str) -> str:
        assert main([*argv]) == 0
        return capsys.readouterr().out

    def names(tree: dict[str, Any], path: str = "") -> set[str]:
        inner = ((f"{path}{name}", value) for name, value in tree.items())
        return {at for one, value in inner for at in (names(value, f"{one}.") if isinstance(value, dict) else {one})}

    fields = names(asdict(Config()))
    brief = told("train", "--help")
    assert len(brief.splitlines()) <= 40
    assert {word.removeprefix("--") for word in brief.split() if word.startswith("--")} >= fields
    described = told("train", "--help", "all")
    assert all(f"--{name} " in described for name in fields)
    for group in ("data", "data.augmentation", "emc2", "optimizer"):
        assert f"--{group} " not in described  # no file may be given there
    of_views = described.split("how the random views are drawn")[1].split("What the encoder is made of")[0]
    for part in of_views.split("  --data.augmentation.")[1:]:
        assert len(" ".join(part.split("(")[0].split()[2:])) > 10, part  # each has words, not its type alone


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"emc2 {torch_emc2.__version__}\n"


def test_hyphens_are_underscores_in_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--batch-size 8 --data.augmentation.crop-scale=[0.5,1] --negative-cache.refresh-fraction 0.5 --seed=3"
    config = read_config("quickstart", words.split())
    assert (config.batch_size, config.data.augmentation.crop_scale) == (8, (0.5, 1.0))
    assert (config.negative_cache.refresh_fraction, config.seed) == (0.5, 3)
    assert read_config("quickstart", ["--data.value-range=-5,3"]).data.value_range == "-5,3"
    assert main(["presets", "quickstart", "--log-every-steps", "7"]) == 0
    assert "log_every_steps: 7" in capsys.readouterr().out


def test_embeddings_are_searched_grouped_and_mapped(
    finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png", "dog/e.png"):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(f"photos/{name}")
    Path("photos/dog/copy.png").write_bytes(Path("photos/cat/a.png").read_bytes())
    run = str(finished)
    assert main(["embed", run, "photos", "-o", "e.parquet", "--normalize"]) == 0
    assert main(["embed", run, "photos", "-o", "e.parquet", "--normalize", "--append"]) == 0
    assert "0 images embedded; left out: 0 unreadable, 0 of other kinds; 6 were in" in capsys.readouterr().out
    assert main(["neighbours", run, "photos/cat/a.png", "--in", "e.parquet", "-k", "2", "-o", "n.png"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [
        "Cosine similarity, class and name of the nearest of 6 images:",
        "photos/cat/a.png",
        "   1.000  dog  photos/dog/copy.png",
    ]
    assert (len(told), told[-1]) == (5, "Written: n.png")
    assert main(["duplicates", "e.parquet", "--threshold", "0.9999", "--csv", "d.csv"]) == 0
    told = capsys.readouterr().out
    assert " 1.000  photos/cat/a.png\n 1.000  photos/dog/copy.png  identical to photos/cat/a.png\n" in told
    assert "Identical, byte for byte a file that comes before in its group: 1 of these." in told
    assert "These are a large part of all images: hardly all of them are duplicates.\n" in told
    assert told.endswith("Written: duplicates.png, d.csv\n")
    rows = Path("d.csv").read_text().splitlines()
    assert rows[0] == "group,similarity,identical,path"
    assert "1,1.000000,yes,photos/dog/copy.png" in rows
    groups = {row.partition(",")[0] for row in rows[1:]}
    hold = "1 group holds" if len(groups) == 1 else f"{len(groups)} groups hold"
    assert f"{hold} {len(rows) - 1} of 6 images. Shown" in told
    assert main(["duplicates", "e.parquet", "--csv", "e.parquet"]) == 2
    assert "e.parquet will be a CSV: give it a name that ends in .csv" in capsys.readouterr().err
    Path("photos/dog/copy.png").unlink()
    assert main(["duplicates", "e.parquet", "--threshold", "1", "--csv", "d.csv"]) == 0  # of what is there none
    assert Path("d.csv").read_text() == "group,similarity,identical,path\n"
    gone = f"e.parquet: 1 of its 6 files are not there any more, and left out ({tmp_path}/photos/dog/copy.png, …)\n"
    none = "None of 5 images are as similar as 1.0: lower --threshold for more\n"
    assert capsys.readouterr().out == gone + none
    assert main(["embed", run, "photos", "-o", "e.parquet", "--normalize", "--append"]) == 0
    assert "1 of the table's files are not there any more: their rows stay" in capsys.readouterr().out
    assert main(["map", "e.parquet"]) == 0
    assert capsys.readouterr().out == f"{gone}Written: map.png\n"
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)  # a file is itself from any folder
    assert main(["embed", run, "../photos", "-o", "../e.parquet", "--normalize", "--append"]) == 0
    assert "0 images embedded; left out: 0 unreadable, 0 of other kinds; 5 were in" in capsys.readouterr().out
    assert main(["neighbours", run, "../photos/cat/a.png", "--in", "../e.parquet", "-k", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[3].split()[-1] != f"{tmp_path}/photos/cat/a.png"
    monkeypatch.chdir(tmp_path)
    shutil.move("photos", "moved")
    assert main(["duplicates", "e.parquet", "--threshold", "0.9999"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"e.parquet: none of its 6 files is there ({tmp_path}/photos/cat/a.png, …); names are all")
    assert " 1.000  photos/cat/a.png\n 1.000  photos/dog/copy.png\n" in out
    assert {file.name for file in Path().glob("*.png")} >= {"n.png", "duplicates.png", "map.png"}


def test_quickstart_train_evaluate_embed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *TINY]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *_, last = lines = [line for line in out.splitlines() if not line.startswith("Compiling ")]
    assert lines[0].startswith("Device: cpu, ")
    assert lines[1] == "Images: 66 to train on; 10 classes, not used in training; views of 8 x 8 x 1."
    assert lines[2].startswith("Model: test_resnet, 0.")
    assert lines[3] == "Steps: 4 of 16 images an epoch, 4 in all; loss emc2."
    assert lines[4].startswith("Epoch 1/1: global loss ")
    assert lines[5].startswith("Trained: 4 steps in ")
    assert last.startswith("Written: runs/quickstart/evaluation.json, runs/quickstart/neighbours.png, ")
    assert all(len(line) <= 80 for line in lines[:-1])
    header, *table = lines[9:-2]
    assert header.split() == ["trained", "untrained", "raw", "pixels"]
    numbers = json.loads((tmp_path / "runs" / "quickstart" / "evaluation.json").read_text())["numbers"]
    assert [line.split()[0] for line in table] == list(numbers["trained"])
    assert table[0].split()[1::2] == [f"{100 * own['probe']:.2f}" for own in numbers.values()]
    for name in ("curves.png", "neighbours.png", "encoder.safetensors", "metrics.csv", "versions.json"):
        assert (tmp_path / "runs" / "quickstart" / name).is_file()

    assert main(["train", "quickstart", "--loss", "infonce", *TINY]) == 2  # the folder is taken
    assert "runs/quickstart is not empty: --resume goes on" in capsys.readouterr().err
    assert main(["train", "quickstart", "--loss", "infonce", *TINY, "--out", "other"]) == 0
    *_, following, further = capsys.readouterr().out.splitlines()
    assert following == "Run: other. Next: emc2 evaluate other"
    assert further == "Or: emc2 map other; emc2 duplicates other; emc2 neighbours other YOUR_IMAGE"
    assert main(["evaluate", "other"]) == 0
    *lines, written = capsys.readouterr().out.splitlines()
    metrics = json.loads((tmp_path / "other" / "evaluation.json").read_text())["numbers"]["trained"]
    assert [line.split()[:1] for line in lines[2:]] == [[name] for name in metrics]
    assert lines[2].split()[1:] == [f"{100 * metrics['probe']:.2f}", "%"]
    assert written == "Written: other/evaluation.json, other/neighbours.png, other/curves.png"
    Path("mine/deep").mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (20, 10 + i), (50 * i, 0, 0)).save(f"mine/deep/{i}.png")
    assert main(["evaluate", "other", "--data", "folder:mine", "--baselines"]) == 0
    out = capsys.readouterr().out
    assert "Note: no accuracies: all training images are of one class, 'deep'\nWritten: other/evaluation-mine-" in out
    assert main(["evaluate", "other", "--data", "mine"]) == 2
    assert "unknown data set 'mine'; a folder of images is folder:mine" in capsys.readouterr().err
    assert main(["diagnose", "other", "--samples", "16", "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "other" / "diagnosis.md").read_text() in out
    assert "InfoNCE: squared bias " in out.splitlines()[0]
    assert out.endswith("Written: other/diagnosis.json, other/diagnosis.md, other/diagnosis.png\n")
    assert main(["embed", "other", "runs/quickstart", "-o", "embeddings.csv"]) == 2
    assert "embeddings.csv will be a Parquet file" in capsys.readouterr().err
    Path("folder.parquet").mkdir()
    assert main(["embed", "other", "runs/quickstart", "-o", "folder.parquet"]) == 2
    assert "folder.parquet is no file that could be written anew: give another name" in capsys.readouterr().err
    assert main(["embed", "other", "runs/quickstart", "-o", "out.parquet"]) == 0  # the run's own pictures
    assert "2 images embedded; left out: 0 unreadable, " in capsys.readouterr().out


def test_an_advised_range_is_taken_though_it_begins_with_a_minus(
    finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for i in range(4):
        Image.fromarray(np.array([[-1000, 3000 - i]], np.int32)).save(f"mine/{i}.tif")
    embed, evaluate = ["embed", str(finished), "mine", "-o", "a.parquet"], ["evaluate", str(finished)]
    for command in (embed, [*evaluate, "--data", "folder:mine"], ["train", "quickstart", "--data.name", "folder:mine"]):
        assert main(command) == 2
        advice = capsys.readouterr().err.split("such as ")[1].split(", or ")[0]
        assert advice.endswith("value_range=-1000,3000" if command[0] == "train" else "--value-range=-1000,3000")
        if command[0] == "embed":
            assert main([*command, advice]) == 0
    assert read_config("quickstart", [advice]).data.value_range == "-1000,3000"


def test_quickstart_refuses_what_it_could_not_evaluate_before_it_trains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test").mkdir()
    Path("train").mkdir()
    for name in ("train/a.png", "train/b.png"):
        Image.new("RGB", (9, 9)).save(name)
    assert main(["quickstart", "--data.name", "folder:.", "--batch_size", "2"]) == 2
    out, err = capsys.readouterr()
    assert "'test' holds 0 images, at least 1 are needed" in err
    assert out == ""
    assert not Path("runs").exists()


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "torch_emc2", "presets"], capture_output=True, text=True, check=True)
    assert "stl10-b32" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_error(buffered: str) -> None:
    command = f"{sys.executable} -m torch_emc2 train --help | head -n 1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": buffered}
    )
    assert done.stdout.startswith("usage: emc2 train")
    assert done.stderr == ""


def test_an_interrupt_ends_with_a_line_how_to_go_on(
    tiny: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(tiny.out).parent.joinpath("tiny.yaml").write_text(to_yaml(tiny))

    def ctrl_c(module: ContrastiveModule, *args: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children ignore it
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ContrastiveModule, "on_train_epoch_end", ctrl_c)
    assert main(["train", str(Path(tiny.out).parent / "tiny.yaml")]) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"emc2: interrupted; emc2 train {tiny.out}/config.yaml --resume starts again: no checkpoint yet"
    assert signal.getsignal(signal.SIGINT) is before  # Lightning leaves it ignored
    signal.signal(signal.SIGINT, inherited)

    def ctrl_c_again(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "evaluate_run", ctrl_c_again)
    Path(tiny.out, "head.safetensors").touch()  # as if it had come to its end
    assert main(["evaluate", tiny.out]) == 130
    assert capsys.readouterr().err == "emc2: interrupted\n"


def test_an_unreadable_image_is_one_line_from_a_worker_too(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for name in "abc":
        Image.effect_noise((12, 12), 50).save(tmp_path / "photos" / f"{name}.png")
        break_inside(tmp_path / "photos" / f"{name}.png")
    data = replace(tiny.data, name=f"folder:{tmp_path}/photos", limit=None, num_workers=1, channels=1)
    (tmp_path / "tiny.yaml").write_text(to_yaml(replace(tiny, data=data, batch_size=2)))
    assert main(["train", str(tmp_path / "tiny.yaml")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("emc2: error: ")
    assert ".png" in line


def test_what_comes_next_writes_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for there, new in (
        ("a.txt", "embeddings"),
        ("embeddings.parquet", "embeddings-2"),
        ("embeddings-2.parquet", "embeddings-3"),
    ):
        Path(there).touch()
        told = _what_next(Path("runs/x"), "folder:my photos").splitlines()
        assert told[1] == f"Then: emc2 embed runs/x 'my photos' -o {new}.parquet"


def test_an_empty_word_too_many_is_told_of() -> None:
    with pytest.raises(ValueError, match=r"unrecognized arguments: an empty word \(see p --help\)"):
        Parser(prog="p").parse_args([""])
