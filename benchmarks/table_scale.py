"""Memory and time of EMC²'s tables at 10^8 samples, and one step's time at 10^5, 10^7 and 10^8 in turn.

    OMP_NUM_THREADS=1 python benchmarks/table_scale.py [--folder /where/there/is/room]

Needs 5 GB of memory and 1 GB of disk. The sizes take turns, so that whatever else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from torch_emc2 import EMC2Loss

DIM, BATCH, RANKS = 128, 256, 4


def memory() -> int:
    """Bytes of this process that are its own: pages of mapped files, which the system can drop, are left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def draw(num_samples: int) -> torch.Tensor:
    """Ids of a batch, all different, from all over the table."""
    part = num_samples // BATCH
    return torch.randint(part, (BATCH,)) + part * torch.arange(BATCH)


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print the seconds of a block, and by how many bytes memory has grown after it and at its peak."""
    samples, done = [memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            samples.append(memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    samples.append(memory())
    kept, peak = samples[-1] - samples[0], max(samples) - samples[0]
    print(f"{what:34s} {seconds:8.3f} s {kept / 1e6:10.1f} MB {peak / 1e6:10.1f} MB", flush=True)


def step(loss_fn: EMC2Loss, index: torch.Tensor, keep: torch.Tensor) -> float:
    z1, z2 = torch.randn(2, BATCH, DIM).unbind()
    start = time.perf_counter()
    loss_fn(z1.requires_grad_(), z2.requires_grad_(), index, encode=lambda ids: keep[ids % len(keep)]).backward()
    return time.perf_counter() - start


def step_times(num_samples: dict[str, int | None], carry: str, calls: int) -> None:
    losses = {name: EMC2Loss(size, kernel="metropolis", carry=carry) for name, size in num_samples.items()}  # type: ignore[arg-type]
    times: dict[str, list[float]] = {name: [] for name in losses}
    keep = torch.randn(1000, DIM, requires_grad=True)
    for _ in range(calls):
        for name, loss_fn in random.sample(list(losses.items()), len(losses)):
            index = draw(loss_fn.num_samples or 2**62)
            times[name].append(step(loss_fn, index, keep))
    first = statistics.median(next(iter(times.values()))[5:])
    for name, seconds in times.items():
        low, median, high = statistics.quantiles(seconds[5:], n=4)
        ratio = median / first
        print(f"{carry:8s} {name:12s} {median * 1e3:8.2f} ms ({low * 1e3:.2f} – {high * 1e3:.2f})  ratio {ratio:.3f}")


def key_cost(count: int) -> None:
    loss_fn = EMC2Loss(None, kernel="metropolis", carry="drop")
    ids = torch.randint(-(2**63), 2**63 - 1, (count,))
    with measured(f"{count:.0e} random keys, placed"):
        for part in ids.split(BATCH):
            slots = loss_fn.sides[0].slots.place(part)
            loss_fn.chains.make_room(slots)
            loss_fn.sides[0].slots.keep(part, slots)
    with measured("and saved"), tempfile.NamedTemporaryFile() as file:
        torch.save(loss_fn.state_dict(), file.name)
        print(f"file: {Path(file.name).stat().st_size / 1e6:.1f} MB")


def save_part(rank: int, world_size: int, num_samples: int, folder: str) -> None:
    """Save as one of several ranks, which write a part each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world_size)
    loss_fn = EMC2Loss(num_samples, kernel="metropolis", carry="drop")
    dist.barrier()
    start = time.perf_counter()
    dcp.save(loss_fn.sharded_state_dict(), checkpoint_id=f"{folder}/checkpoint")
    if rank == 0:
        print(f"{f'dcp.save, {world_size} ranks':34s} {time.perf_counter() - start:8.3f} s")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=10**8)
    parser.add_argument("--keys", type=int, default=10**6)
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--folder", default=None, help="where the state is saved")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    print(f"b = {BATCH}, d = {DIM}\n")

    EMC2Loss(1000, kernel="metropolis", carry="drop")(
        *torch.randn(2, BATCH, DIM), torch.arange(BATCH)
    )  # compiles the walk
    index = draw(args.num_samples)
    print(f"{f'{args.num_samples:.0e} samples, a chain each':34s} {'':10s} {'kept':>13s} {'peak':>13s}")
    with measured("create"):
        loss_fn = EMC2Loss(args.num_samples, kernel="metropolis", carry="drop")
    with measured("first step"):
        step(loss_fn, index, torch.empty(0))
    with measured("second step"):
        step(loss_fn, index, torch.empty(0))
    with measured("state_dict"):
        state = loss_fn.state_dict()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "loss.pt")
        with measured("torch.save"):
            torch.save(state, path)
        print(f"file: {path.stat().st_size / 1e6:.1f} MB")
        for mmap in (True, False):
            with measured(f"torch.load, mmap={mmap}, and load"):
                loss_fn.load_state_dict(torch.load(path, weights_only=True, mmap=mmap))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        torch.multiprocessing.spawn(save_part, (RANKS, args.num_samples, folder), nprocs=RANKS)  # type: ignore[no-untyped-call]
        sizes = [f"{file.stat().st_size / 1e6:.1f} MB" for file in Path(folder, "checkpoint").glob("*.distcp")]
        print(f"files: {', '.join(sizes)}")
        with measured("dcp.load, 1 rank"):
            dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    with measured("forget 1000 samples"):
        loss_fn.forget(torch.randint(args.num_samples, (1000,)))
    del loss_fn, state
    key_cost(args.keys)
    print()

    sizes: dict[str, int | None] = {f"{size:.0e}": size for size in (10**5, 10**7, args.num_samples)}
    for carry in ("drop", "encode"):
        step_times(sizes | {"keys": None}, carry, args.calls)


if __name__ == "__main__":
    main()
