"""Kills a run at random moments, resumes it, and compares what it leaves with a run that nothing disturbed.

    python benchmarks/kill_loop.py --kills 50 [--ranks 2] [--signal TERM]

SIGKILL may cost the steps since the last checkpoint; SIGTERM, which a run answers by saving, none. Every life is forked
from this process, which has imported all that it needs. Exit status 0: no difference.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file

from torch_emc2.config import Config, read_config
from torch_emc2.training import train

EVERY = 3  # steps from one checkpoint to the next


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and resume a run, and compare with one that is left alone.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    end = signal.Signals[f"SIG{args.signal}"]
    may_lose = EVERY if end == signal.SIGKILL else 0
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        # Enough steps for every life to take a few: batches of 32 of 1437 images, 44 an epoch.
        words = f"--batch_size {32 // args.ranks} --epochs {2 + args.kills // 6} --checkpoint_every_steps {EVERY}"
        words += f" --devices {args.ranks} --accelerator cpu --log_every_steps 1 --model.norm group"
        words += " --data.augmentation.size 8"
        config = read_config("quickstart", words.split())
        whole, killed = (replace(config, out=f"{folder}/{name}") for name in ("whole", "killed"))
        start_up, training = _left_alone(whole, args.ranks)
        kills = torn = most_lost = saved = 0
        while True:
            born = time.time_ns()
            pids = _fork(killed, args.ranks)
            if kills < args.kills:
                _wait(Path(killed.out), pids, born, moments, start_up, training / args.kills)
                _kill(pids, end)
            if _finished(pids, Path(killed.out), end):
                break
            kills += 1
            torn += _writing(Path(killed.out), born)
            before, saved = saved, _saved(Path(killed.out))  # fails if last.ckpt does not load
            taken = max(saved, _taken(Path(killed.out)))
            assert before <= saved, f"the last checkpoint went from step {before} back to {saved}"
            assert taken - saved <= may_lose, f"{taken} steps were taken, the last checkpoint has {saved}"
            most_lost = max(most_lost, taken - saved)
            print(f"kill {kills:3d}: step {taken:4d}, checkpoint {saved:4d}", flush=True)
        different = _differences(Path(whole.out), Path(killed.out))
        print(
            f"{kills} kills by {end.name}, {kills} resumes, {args.ranks} rank(s), {_saved(Path(whole.out))} steps: "
            f"{torn} kills while a checkpoint was written, at most {most_lost} steps lost, "
            f"{len(different)} differences {different or ''}"
        )
        return 0 if kills == args.kills and not different else 1


def _wait(run: Path, pids: list[int], born: int, moments: random.Random, start_up: float, share: float) -> None:
    """Wait for a random moment: of the start, of its share of the training, or of a checkpoint's writing."""
    kind = moments.choice(("start", "training", "writing"))
    if kind == "start":
        time.sleep(moments.uniform(0, start_up))
        return
    while not _since(run / "metrics.csv", born) and _alive(pids[0]):
        time.sleep(0.001)
    time.sleep(moments.uniform(0, share))
    if kind == "writing":
        while not _writing(run, born) and _alive(pids[0]):
            time.sleep(0.0001)


def _alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _since(file: Path, born: int) -> bool:
    """Tell whether a file was written in this life."""
    try:
        return file.stat().st_mtime_ns > born
    except FileNotFoundError:
        return False


def _writing(run: Path, born: int) -> bool:
    """Tell whether a checkpoint is half written in this life."""
    return any(_since(file, born) for file in (run / "checkpoints").glob(".last.ckpt.*.partial"))


def _left_alone(config: Config, ranks: int) -> tuple[float, float]:
    """Run, and return the seconds until its first row and from there on."""
    start = time.monotonic()
    pids = _fork(config, ranks)
    while not (Path(config.out) / "metrics.csv").exists() and time.monotonic() < start + 120:
        time.sleep(0.01)
    first = time.monotonic()
    if not _finished(pids, Path(config.out)):
        sys.exit("the run that is left alone failed")
    return first - start, time.monotonic() - first


def _fork(config: Config, ranks: int) -> list[int]:
    """Start the ranks as torchrun would, in one process group, and return their ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _live(config, rank, ranks, port, pids[0] if pids else 0)
        os.setpgid(pid, pids[0] if pids else 0)  # here too: whoever comes first
        pids.append(pid)
    return pids


def _live(config: Config, rank: int, ranks: int, port: int, group: int) -> None:
    status = 1
    try:
        os.setpgid(0, group)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if ranks > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
            names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kill_loop"}
            os.environ.update({name: str(value) for name, value in names.items()})
            rank_zero_only.rank = rank  # which was read from there when Lightning was imported
        train(config, resume=True)
        status = 0
    except SystemExit as end:  # after SIGTERM
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _kill(pids: list[int], end: signal.Signals) -> None:
    try:
        os.killpg(pids[0], end)
    except ProcessLookupError:  # all have finished
        return


def _finished(pids: list[int], run: Path, end: signal.Signals = signal.SIGKILL) -> bool:
    """Wait for the ranks' ends: True if they trained to the end, False if they were stopped."""
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if set(ends) - {0, -end}:
        sys.exit(f"a rank failed: exit status {ends}")
    return set(ends) == {0} and (run / "head.safetensors").exists()


def _saved(run: Path) -> int:
    """Return the steps that the last checkpoint has."""
    last = run / "checkpoints" / "last.ckpt"
    return int(torch.load(last, weights_only=True)["global_step"]) if last.exists() else 0


def _taken(run: Path) -> int:
    """Return the steps that metrics.csv knows of."""
    if not (run / "metrics.csv").exists():
        return 0
    with (run / "metrics.csv").open(newline="") as file:
        return 1 + int(list(csv.DictReader(file))[-1]["step"])


def _differences(one: Path, other: Path) -> list[str]:
    """Name what is not bit for bit the same."""
    different = [
        name
        for name in ("metrics.csv", "encoder.safetensors", "head.safetensors")
        if (one / name).read_bytes() != (other / name).read_bytes()
    ]
    known: list[dict[str, Any]] = [{}, {}]
    for run, tensors in zip((one, other), known, strict=True):
        _collect(load_file(run / "encoder.safetensors"), "encoder", tensors)
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            _collect(checkpoint[part], part, tensors)
    if known[0].keys() != known[1].keys():
        return [*different, *sorted(known[0].keys() ^ known[1].keys())]
    for name, value in known[0].items():
        want = known[1][name]
        if not (torch.equal(value, want) if isinstance(value, torch.Tensor) else value == want):
            different.append(name)
    return different


def _collect(value: Any, name: str, known: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{name}.{key}", known)
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            _collect(item, f"{name}.{key}", known)
    else:
        known[name] = value


if __name__ == "__main__":
    sys.exit(main())
