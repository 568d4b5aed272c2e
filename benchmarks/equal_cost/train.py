"""Train a cell, and measure: quality, encodings, seconds, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Result
from encoders import BagEncoder
from methods import METHODS, Given
from problem import Problem
from retrieval import global_loss, metrics, ranks
from torch import Tensor, nn
from torch.nn.functional import normalize
from towers import Tower, on, towers

__all__ = ["run", "train"]

SEEN = 2000
"""Training queries that are looked at afterwards."""


def run(cell: Cell, problem: Problem, device: str) -> Result:
    """Train and measure in this process, which has done nothing else: its memory is the cell's."""
    train(cell, problem, device, steps=2)  # what is loaded and compiled at a first step
    before = _peak_mb(device, reset=True)
    trained, cost = train(cell, problem, device)
    return {**cost, "peak_mb": _peak_mb(device) - before, **_evaluate(cell, problem, trained)}


def train(cell: Cell, problem: Problem, device: str, steps: int | None = None) -> tuple[tuple[Tower, Tower], Result]:
    """Return both towers after the whole training, or so many steps of it, and what it cost."""
    torch.manual_seed(cell.seed)
    method = METHODS[cell.method]
    x, y = towers(problem, device)
    size = min(cell.batch_size * method.batches, len(x.pairs))
    total = math.floor(cell.epochs * (len(x.pairs) // size))
    dim = _embed(x, x.pairs[:1]).shape[1]
    step = method.make(Given(x, y, cell.batch_size, cell.temperature, cell.kappa, total, cell.seed, dim))
    optimizers = _optimizers([x.encoder, y.encoder], cell.lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda done: (1 + math.cos(math.pi * done / total)) / 2)
        for each in optimizers
    ]
    losses: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    for rows in _batches(len(x.pairs), size, total if steps is None else steps, cell.seed):
        try:
            losses.append(step(rows).item())
        except ValueError as error:  # the library refuses an embedding that is not finite
            return (x, y), {"steps": len(losses), "diverged": str(error)}
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    last = losses[-max(1, len(losses) // 10) :]
    return (x, y), {
        "steps": len(losses),
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "pairs": len(losses) * size,
        "encoded": x.passes[0] + y.passes[0],
        "differentiated": x.passes[1] + y.passes[1],
        "loss": sum(last) / max(1, len(last)),
    }


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Give batches of epochs, each in an order of its own; what is left over of one is not used."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(count, generator=generator).split(size)[: count // size]:
            if steps == 0:
                return
            steps -= 1
            yield rows


def _optimizers(encoders: list[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Adam for all; tables in a form of their own."""
    tables = [part.bag.weight for part in encoders if isinstance(part, BagEncoder)]
    dense = {p: None for part in encoders for p in part.parameters()}  # once, where both sides have one encoder
    for table in tables:
        del dense[table]
    return [torch.optim.Adam(list(dense), lr, fused=True), *([torch.optim.SparseAdam(tables, lr)] if tables else [])]


@torch.no_grad()
def _evaluate(cell: Cell, problem: Problem, trained: tuple[Tower, Tower]) -> Result:
    x, y = trained
    everything, train = torch.arange(len(problem.y.ids)), problem.parts["train"]
    keys = _embed(y, everything)
    if not keys.isfinite().all():
        return {}
    parts: dict[str, Tensor] = {"validation": problem.parts["validation"]}
    if cell.final:
        parts["test"] = problem.parts["test"]
    found: dict[str, Any] = {}
    for name, part in {"train": train[:SEEN], **parts}.items():
        queries = _embed(x, part)
        if not queries.isfinite().all():  # which would come first of all
            return {}
        found[name] = metrics(ranks(queries, keys, problem.positives(part, everything)))
        if name == "train":
            positives = problem.positives(part, train)
            found["global_loss"] = global_loss(queries, keys[train], positives, cell.temperature)
    return found


@torch.no_grad()
def _embed(tower: Tower, rows: Tensor) -> Tensor:
    """Embed any pairs, of training or not; texts of like length together, which leaves little to fill up."""
    content = tower.side.content
    order = content.lengths[rows].argsort() if hasattr(content, "lengths") else torch.arange(len(rows))
    parts = (on(tower.device, content[some]) for some in rows[order].split(256))
    return torch.cat([normalize(tower.encoder(part)).cpu() for part in parts])[order.argsort()]


def _peak_mb(device: str, *, reset: bool = False) -> float:
    """The most memory this process has had since the last reset, in MB (Linux), or of a GPU; at one, what it has."""
    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
