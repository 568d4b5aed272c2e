"""Images encoded and steps taken a second in training, beside InfoNCE and lightly's SimCLR, and where the time goes.

    python benchmarks/training.py [--data fashion-mnist stl10] [--batch-sizes 32 256] [--plot time.png]

The runs take turns, step by step and in random order, so that whatever else the machine does meets all of them alike;
rates are medians over steps, ratios the medians of the turns' own. A run's first epoch is not measured: in it all
chains are empty. ``--set`` gives fields as `emc2 train` takes them. Given several times, each is a run of every method:
``--set "" --set "--precision bf16-mixed"`` compares two settings, and the first of them with lightly's. Images of
STL-10's shape, and photos, are noise.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import random
import shlex
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import matplotlib
import numpy as np
import torch
from lightning.pytorch.profilers import Profiler
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torch_emc2.config import Config, read_config
from torch_emc2.data import ImageDataset, RandomView, open_dataset
from torch_emc2.models import build_encoder
from torch_emc2.training import train

METHODS = {
    "InfoNCE": "--loss infonce",
    "EMC², encode": "--emc2.carry encode",
    "EMC², cache": "--emc2.carry cache",
    "isir, encode": "--emc2.carry encode --emc2.kernel isir",
    "isir, cache": "--emc2.carry cache --emc2.kernel isir",
}
LIGHTLY = "lightly's SimCLR"
PARTS = {"data": "C0", "encoder": "0.75", "loss": "C3", "optimiser": "C4", "the rest": "C1"}
COMMON = (
    "--model.backbone {backbone} --model.norm batch --model.stem standard --channels_last true "
    "--optimizer.warmup_epochs 0"
)
PRESETS = {
    "fashion-mnist": "fashion-mnist",
    "stl10": "stl10-b32",
    "photos": "stl10-b32 --data.name folder:{root}/photos",  # JPEGs of 500 x 375, views of 96 x 96
}


@dataclass
class Step:
    """What a step took."""

    images: int = 0  # encoded
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the process that trains
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


class Turns:
    """Lets one of several threads work at a time: each takes a step when all have taken the one before."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.there: list[str] = []
        self.left: list[str] = []  # of this round

    def run(self, works: dict[str, Callable[[Callable[[], None]], None]]) -> None:
        """Call each with what gives its turn to the next, and waits for another."""

        def work(name: str) -> None:
            with self.changed:
                self.changed.wait_for(lambda: self.now == name)
            try:
                works[name](partial(self.pass_on, name))
            finally:
                self.there.remove(name)
                self.left = [other for other in self.left if other != name]
                self.give()

        self.there = list(works)
        with ThreadPoolExecutor(len(works)) as pool:
            self.now = ""
            done = pool.map(work, works)
            self.give()
        list(done)  # raises

    def give(self) -> None:
        with self.changed:
            self.left = self.left or random.sample(self.there, len(self.there))
            self.now = self.left.pop() if self.left else ""
            self.changed.notify_all()

    def pass_on(self, name: str) -> None:
        self.give()
        with self.changed:
            self.changed.wait_for(lambda: self.now == name)


class Watch(Profiler):
    """Gives the time from each mark to the next to a part of the step, by what Lightning tells its profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.around, self.compared = "the rest", False
        self.restart()

    def restart(self) -> None:
        self.step, self.begun, self.last = Step(), time.process_time(), time.perf_counter()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self.step.parts[part] += now - self.last
        self.last = now

    def start(self, action_name: str) -> None:
        if action_name.endswith((".train_dataloader_next", ".batch_to_device", ".backward")):
            self.mark("the rest")
            self.compared = False

    def stop(self, action_name: str) -> None:
        if action_name.endswith((".train_dataloader_next", ".batch_to_device")):
            self.mark("data")
        elif action_name.endswith(".backward"):
            self.mark("encoder")
        elif action_name.endswith(".optimizer_step"):
            self.mark("optimiser")

    def follow(self, encoder: nn.Module, loss: nn.Module) -> None:
        def in_the_loss(inside: bool) -> None:
            self.mark(self.around)
            self.around = "loss" if inside else "the rest"

        def encoded(encoder: nn.Module, images: tuple[Tensor], embeddings: Tensor) -> None:
            self.mark("encoder")
            self.step.images += len(images[0])
            embeddings.register_hook(first_gradient)

        def first_gradient(gradient: Tensor) -> None:  # what follows is the encoder's backward pass
            if not self.compared:
                self.mark("loss")
                self.compared = True

        loss.register_forward_pre_hook(lambda *_: in_the_loss(True))
        loss.register_forward_hook(lambda *_: in_the_loss(False))
        encoder.register_forward_pre_hook(lambda *_: self.mark(self.around))
        encoder.register_forward_hook(encoded)


class Measure(L.Callback):
    """Measures the steps, from the second epoch on, of a module that has an ``encoder`` and a ``loss``."""

    def __init__(self, pass_on: Callable[[], None]) -> None:
        self.pass_on, self.steps, self.watch = pass_on, [], Watch()

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self.watch.follow(module.encoder, module.loss)
        trainer.profiler = self.watch

    def on_train_epoch_start(self, *args: Any) -> None:
        self.watch.restart()

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.watch.mark("the rest")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.watch.mark("the rest")
        step = self.watch.step
        step.seconds, step.cpu_seconds = sum(step.parts.values()), time.process_time() - self.watch.begun
        if trainer.current_epoch:
            self.steps.append(step)
        self.pass_on()
        self.watch.restart()


class SimCLR(L.LightningModule):
    """SimCLR as lightly's documentation has it, with our encoder in the place of its backbone and head."""

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss

        self.config = config
        self.encoder = build_encoder(config.model, channels, config.data.augmentation.size)
        if config.channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        self.loss = NTXentLoss(config.temperature)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        first, second, _ = batch
        loss: Tensor = self.loss(self.encoder(first), self.encoder(second))
        self.log("train_loss_ssl", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        own = self.config.optimizer
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[own.name]
        return kind(self.parameters(), lr=own.lr, weight_decay=own.weight_decay)


class TwoViews(Dataset[tuple[Tensor, Tensor, int]]):
    """A sample at a time, as most libraries have it."""

    def __init__(self, images: ImageDataset, config: Config) -> None:
        self.images, self.transform = images, RandomView(config.data.augmentation)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        image = self.images.image(i)
        return self.transform(image), self.transform(image), i


def train_lightly(config: Config, measure: Measure) -> None:
    data = config.data
    images = open_dataset(data.name, "train", Path(data.root), limit=data.limit)
    workers = {"num_workers": data.num_workers, "persistent_workers": data.num_workers > 0}
    loader = DataLoader(TwoViews(images, config), config.batch_size, shuffle=True, drop_last=True, **workers)
    trainer = L.Trainer(
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=1,
        precision=config.precision,
        default_root_dir=config.out,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[measure],
    )
    trainer.fit(SimCLR(config, images.channels), loader)


def measure(rows: dict[str, tuple[str, Config]]) -> dict[str, list[Step]]:
    """Train each method with its config, in turns, and return the steps of each."""
    steps: dict[str, list[Step]] = {}

    def work(name: str, pass_on: Callable[[], None]) -> None:
        method, config = rows[name]
        callback = Measure(pass_on)
        config.out = f"{folder}/{list(rows).index(name)}"
        if method == LIGHTLY:
            train_lightly(config, callback)
        else:
            train(config, callbacks=[callback])
        steps[name] = callback.steps

    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Turns().run({name: partial(work, name) for name in rows})
    return {name: steps[name] for name in rows}


def noise(data: str, root: Path, count: int) -> None:
    """Write images of a kind that there is no package of."""
    generator = np.random.default_rng(0)
    if data == "stl10":
        (root / "stl10_binary").mkdir()
        generator.integers(0, 256, (count, 3 * 96 * 96), np.uint8).tofile(root / "stl10_binary" / "unlabeled_X.bin")
    elif data == "photos":
        (root / "photos").mkdir()
        for i in range(count):
            coarse = Image.fromarray(generator.integers(0, 256, (47, 63, 3), np.uint8))
            coarse.resize((500, 375)).save(root / "photos" / f"{i}.jpg", quality=90)


def methods(names: list[str], sets: list[str]) -> dict[str, tuple[str, str]]:
    """Return method and fields of each row."""
    rows = {f"{name} {words}".strip(): (name, words) for name, words in product(names, sets)}
    with contextlib.suppress(ImportError):
        import lightly  # noqa: F401

        rows[LIGHTLY] = LIGHTLY, sets[0]
    return rows


def table(steps: dict[str, list[Step]]) -> None:
    reference = next(iter(steps.values()))

    def rates(of: list[Step], what: str, seconds: str = "seconds") -> list[float]:
        return [(getattr(step, what) if what == "images" else 1) / getattr(step, seconds) for step in of]

    def ratio(of: list[Step], *how: str) -> float:
        pairs = zip(rates(of, *how), rates(reference, *how), strict=True)
        return statistics.median(own / other for own, other in pairs)

    print("| method | images/s | ratio | by CPU time | steps/s | ratio | by CPU time | " + " | ".join(PARTS) + " |")
    print("|---|" + "--:|" * (6 + len(PARTS)))
    for name, of in steps.items():
        cells = [name]
        for what, digits in (("images", 0), ("steps", 2)):
            cells.append(f"{statistics.median(rates(of, what)):.{digits}f}")
            cells += [f"{ratio(of, what, seconds):.2f}" for seconds in ("seconds", "cpu_seconds")]
        cells += [f"{milliseconds:.1f}" for milliseconds in parts(of).values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def parts(of: list[Step]) -> dict[str, float]:
    """Milliseconds a step that each part takes."""
    return {part: 1e3 * statistics.median(step.parts[part] for step in of) for part in PARTS}


def plot(panels: dict[str, dict[str, list[Step]]], out: str) -> None:
    from matplotlib import pyplot

    matplotlib.use("agg")
    figure, grid = pyplot.subplots(len(panels), 1, figsize=(8, 0.5 + 2.1 * len(panels)), squeeze=False)
    for (title, steps), axes in zip(panels.items(), grid[:, 0], strict=True):
        left = np.zeros(len(steps))
        for part, colour in PARTS.items():
            widths = np.array([parts(of)[part] for of in steps.values()])
            axes.barh(list(steps), widths, left=left, color=colour, label=part)
            left += widths
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1, 0].set_xlabel("Milliseconds a step")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=PRESETS, default=["fashion-mnist", "stl10"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--images", type=int, default=512, help="of an epoch, at least two batches")
    parser.add_argument("--epochs", type=int, default=3, help="that are measured")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is 1")
    parser.add_argument("--set", action="append", metavar="FIELDS", help="of all runs")
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--plot", metavar="PNG", help="where the time goes, as stacked bars")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if args.accelerator in ("gpu", "cuda") else f"{os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {device}, {torch.get_num_threads()} threads")
    rows, panels = methods(args.methods, args.set or [""]), {}
    with TemporaryDirectory() as root:
        for data in args.data:
            noise(data, Path(root), max(args.images, 2 * max(args.batch_sizes)))
        for data, size in product(args.data, args.batch_sizes):
            limit = max(args.images, 2 * size)
            preset, *own = PRESETS[data].format(root=root).split()
            words = f"{COMMON.format(backbone=args.backbone)} --data.root {root} --data.num_workers 0 {' '.join(own)}"
            words += f" --data.limit {limit} --batch_size {size} --epochs {1 + args.epochs}"
            words += f" --accelerator {args.accelerator}"
            configs = {
                name: (method, read_config(preset, shlex.split(f"{words} {METHODS.get(method, '')} {fields}")))
                for name, (method, fields) in rows.items()
            }
            panels[title := f"{data}, b = {size}"] = steps = measure(configs)
            count = len(next(iter(steps.values())))
            print(f"\n{title}, {args.backbone}, {count} steps; of each part, milliseconds a step\n")
            table(steps)
    if args.plot:
        plot(panels, args.plot)


if __name__ == "__main__":
    main()
