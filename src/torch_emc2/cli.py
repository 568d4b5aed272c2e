"""The command ``emc2``."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch_emc2 import __version__, cli_runs
from torch_emc2.names import did_you_mean

__all__ = ["main"]

_USAGE = """\
usage: emc2 COMMAND …

  quickstart                         train on bundled digits, evaluate, draw: about a minute on two CPU cores
  train PRESET_OR_YAML_OR_folder:PATH [--FIELD VALUE …] [--resume]
                                     pre-train an encoder; emc2 train --help names the fields, --help all describes them
  evaluate RUN [--data NAME] [--value-range MIN,MAX] [--baselines]
                                     linear probe and k-NN of a run's encoder, and numbers that need no labels
  diagnose RUN                       how wrong each estimator's gradient is at a run's weights, and why
  embed RUN FOLDER_OR_IMAGE … -o OUT.parquet
                                     embed your own images
  neighbours RUN FOLDER_OR_IMAGE … [--in EMBEDDINGS.parquet]
                                     the images nearest to given ones
  duplicates RUN_OR_PARQUET [--threshold 0.98]
                                     groups of near duplicates
  map RUN_OR_PARQUET [-o map.png]    draw embeddings in the plane, by class or cluster
  report RUN … [-o FILE.html]        one page on runs side by side: curves, quality, diagnosis, pictures
  export RUN FOLDER [--onnx] [--push OWNER/NAME]
                                     a folder that timm and the Hugging Face hub take, with a model card
  experiment NAME [--dataset D] [--scale smoke|small|full] [--seeds 0 1 2]
                                     run one of the paper's experiments, or ours; emc2 experiment lists them
  presets [NAME [--FIELD VALUE …]]   list the presets, or print one as YAML to start from

  --version                          print the version
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 2 for what the user can mend, 130 when interrupted."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if command in ("-V", "--version"):
        print(f"emc2 {__version__}")
        return 0
    commands = {
        "quickstart": _quickstart,
        "train": _train,
        "evaluate": cli_runs.evaluate,
        "diagnose": cli_runs.diagnose,
        "embed": cli_runs.embed,
        "neighbours": cli_runs.neighbours,
        "duplicates": cli_runs.duplicates,
        "map": cli_runs.draw_map,
        "report": cli_runs.report,
        "export": cli_runs.export,
        "experiment": _experiment,
        "presets": _presets,
    }
    if command not in commands:
        meant = did_you_mean(command, [*commands]) or f"; there are {', '.join(commands)}"
        print(f"emc2: error: no command {command!r}{meant}", file=sys.stderr)
        return 2
    try:
        with _interruptible(), _told():
            commands[command](rest)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        from torch_emc2.error_text import cause

        if os.environ.get("EMC2_TRACEBACK"):
            raise
        print(f"emc2: error: {cause(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f'emc2: error: {error}; python -m pip install "torch-emc2[train]" installs it', file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("; ".join(["emc2: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    return 0


def _train(argv: list[str]) -> None:
    if not argv or _asks_for_help(argv):
        _list_fields(argv, "emc2 train")
        return
    resume = "--resume" in argv
    preset, *rest = [argument for argument in argv if argument != "--resume"] or [""]
    if preset.startswith("-"):
        raise ValueError(f"the preset or YAML file comes first, got {preset}")
    from torch_emc2.config import read_config
    from torch_emc2.locks import only_writer
    from torch_emc2.run_folder import refuse_used
    from torch_emc2.settings.images import require_data
    from torch_emc2.settings.model import require_weights

    config = read_config(preset, rest)  # all that can be wrong, before the rest is imported, which takes seconds
    if not resume:  # of which the folder may count from where it was started
        require_data(config.data.name)
    require_weights(config.model)
    if not resume and config.devices == 1:  # of several processes others would find what the first has begun
        with only_writer(Path(config.out)):
            refuse_used(Path(config.out))
    from lightning.pytorch.utilities import rank_zero_only

    from torch_emc2.ranks import leaving_the_group
    from torch_emc2.training import train
    from torch_emc2.training.run_images import own_data

    if rank_zero_only.rank:  # type: ignore[attr-defined]  # one process tells
        logging.getLogger("torch_emc2").setLevel(logging.WARNING)
    with leaving_the_group():
        run = train(config, resume=resume)
        rank_zero_only(print)(_what_next(run, own_data(config.data, run).name))


def _what_next(run: Path, data: str) -> str:
    """Say what can be done with a run's own folder and images."""
    own = shlex.quote(str(run))
    lines = [f"Run: {run}. Next: emc2 evaluate {own}"]
    if data.startswith("folder:"):
        images = shlex.quote(data.removeprefix("folder:"))
        names = ("embeddings.parquet", *(f"embeddings-{i}.parquet" for i in range(2, 1000)))
        new = next(name for name in names if not Path(name).exists())
        lines.append(f"Then: emc2 embed {own} {images} -o {new}")
    return "\n".join([*lines, f"Or: emc2 map {own}; emc2 duplicates {own}; emc2 neighbours {own} YOUR_IMAGE"])


def _asks_for_help(argv: list[str]) -> bool:
    return "-h" in argv or "--help" in argv


def _list_fields(argv: list[str], prog: str) -> None:
    from torch_emc2.cli_fields import all_fields, groups_of_fields

    print(all_fields(prog) if "all" in argv else groups_of_fields(prog), end="")


def _quickstart(argv: list[str]) -> None:
    from torch_emc2.config import read_config
    from torch_emc2.settings.images import require_data
    from torch_emc2.settings.model import require_weights

    if _asks_for_help(argv):
        _list_fields(argv, "emc2 quickstart")
        return
    start = time.monotonic()
    config = read_config("quickstart", argv, prog="emc2 quickstart")
    if config.devices != 1:
        raise ValueError(f"quickstart has one device, got {config.devices}: emc2 train quickstart takes more")
    require_data(config.data.name)
    require_weights(config.model)
    config.out = _free(config.out)
    from torch_emc2.evaluation import to_text
    from torch_emc2.runs import evaluate_run
    from torch_emc2.training import train

    run = train(config)
    evaluation, written = evaluate_run(run, baselines=True)
    print(f"\n{to_text(evaluation)}\n")
    print(f"Written: {', '.join(map(str, written))}. Encoder: {run}/encoder.safetensors.", end=" ")
    print(f"{time.monotonic() - start:.0f} seconds.")


def _experiment(argv: list[str]) -> None:
    from torch_emc2.cli_arguments import Parser, data_set, path, whole
    from torch_emc2.config import plain_words
    from torch_emc2.experiments.definitions import EXPERIMENTS, SCALES, base_config, read_tuned

    parser = Parser(
        prog="emc2 experiment",
        description="Run what is not finished of an experiment, and write results.csv, table.md and figure.png.",
        epilog="Further --FIELD VALUE are those of emc2 train, for every run. Experiments: "
        + "; ".join(f"{name}: {experiment.title}" for name, experiment in EXPERIMENTS.items()),
    )
    parser.add_argument("name", choices=EXPERIMENTS, metavar="NAME")
    parser.add_argument("--dataset", type=data_set, help="any that emc2 train knows; by default the experiment's own")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=whole(1), default=1, help="runs at a time")
    parser.add_argument("--tuned", type=path, help="best.yaml of the experiment search")
    parser.add_argument("--out", type=path, default=Path("results"))
    if not argv:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:16s} {experiment.title}")
        return
    args, given = parser.parse_known_args(argv)
    overrides = plain_words(given)
    base_config(args.dataset or EXPERIMENTS[args.name].dataset, args.scale, overrides)  # refuses what is no setting
    tuned = None if args.tuned is None else read_tuned(args.tuned)
    from torch_emc2.experiments.run import run_experiment

    folder = run_experiment(
        args.name,
        dataset=args.dataset,
        scale=args.scale,
        seeds=args.seeds,
        out=args.out,
        jobs=args.jobs,
        tuned=tuned,
        overrides=overrides,
    )
    print((folder / "table.md").read_text())
    print(f"Written: {folder}/results.csv, table.md, figure.png")


def _presets(argv: list[str]) -> None:
    from torch_emc2.config import presets, read_config, to_yaml

    if argv and argv[0] in ("-h", "--help"):
        print("usage: emc2 presets [NAME [--FIELD VALUE …]]: list the presets, or print one as YAML")
        return
    if argv:
        print(to_yaml(read_config(argv[0], argv[1:], prog="emc2 presets")), end="")
        return
    for name, file in presets().items():
        print(f"{name:16s} {file.read_text().splitlines()[0].removeprefix('# ')}")


class _Lines(logging.Handler):
    """Prints what the library tells of its work, each thing once."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text not in self.told:
            self.told.add(text)
            print(text, flush=True)


@contextmanager
def _told() -> Iterator[None]:
    log, lines = logging.getLogger("torch_emc2"), _Lines()
    log.setLevel(logging.INFO)
    log.addHandler(lines)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(logging.NOTSET)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end an import too: there some packages catch the exception, and go on with half of themselves."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_globals.get("__name__") == "importlib._bootstrap":
                os.write(2, b"emc2: interrupted\n")
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as a background shell's children do, or a caller's own
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _free(folder: str) -> str:
    """Return the folder's name, with a number where it is taken."""
    number, free = 2, folder
    while Path(free).exists():
        number, free = number + 1, f"{folder}-{number}"
    return free
