"""What an experiment measures while a run goes on: accuracies, or the exact objective."""

from __future__ import annotations

import csv
import math
import resource
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from torch_emc2.config import Config
from torch_emc2.data import FiniteViews, ImageDataset, evaluation_transform
from torch_emc2.evaluation import accuracies, classifiable, extract_features
from torch_emc2.exact import global_backward, objective_mass
from torch_emc2.files import whole_file
from torch_emc2.held_out import held_out_fifth
from torch_emc2.training.run_images import evaluation_parts

__all__ = ["AccuracyCurve", "Curve", "GradientCurve", "Part", "read_curve"]

Part = Literal["test", "validation"]
Row = dict[str, float]


class Curve(L.Callback, ABC):
    """Rows measured along a run; seconds and memory are those of training alone.

    Attributes:
        rows: ``step``, ``samples`` seen by all devices, ``seconds`` of training, and what `measure` gives.
        peak_memory_mb: largest memory up to the first row, before anything is measured: a GPU's, or this process's.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.peak_memory_mb = 0.0
        self._samples, self._seconds, self._since = 0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the samples."""
        self._samples += len(batch.index) * trainer.world_size

    def add(self, trainer: L.Trainer, module: Any) -> None:
        """Measure with the clock stopped."""
        self._seconds += time.perf_counter() - self._since
        self.peak_memory_mb = self.peak_memory_mb or _peak_memory_mb()
        passed = {"step": trainer.global_step, "samples": self._samples, "seconds": self._seconds}
        self.rows.append({**passed, **self.measure(trainer, module)})
        self._since = time.perf_counter()

    @abstractmethod
    def measure(self, trainer: L.Trainer, module: Any) -> Row:
        """Return the numbers of a row."""

    def write(self, file: Path) -> None:
        """Write the rows as CSV."""
        with whole_file(file) as path, path.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def read_curve(file: Path) -> list[Row]:
    """Read what `Curve.write` wrote."""
    with file.open(newline="") as source:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(source)]


class AccuracyCurve(Curve):
    """Linear probe and k-NN of the encoder as it is at the end of some epochs, the last among them.

    Args:
        config: the run.
        points: how many epochs, evenly spaced.
        labelled: at most so many labelled images fit the probe, and at most so many are classified; None for all.
        part: ``"validation"`` is a fifth of the labelled training images, which then do not fit the probe.
    """

    def __init__(self, config: Config, points: int, labelled: int | None, part: Part) -> None:
        super().__init__()
        self.epochs = {math.ceil(config.epochs * (i + 1) / points) for i in range(points)}
        self.config = config
        train, test = evaluation_parts(config, Path(config.out))
        if part == "validation" and train.labels is not None:
            held = held_out_fifth(train.labels)
            train, test = train.subset((~held).nonzero()[:, 0]), train.subset(held.nonzero()[:, 0])
        train, test = _at_most(train, labelled), _at_most(test, labelled)
        rows, notes = classifiable(train.labels, test.labels, train.classes)
        if len(rows) == 0:
            raise ValueError(f"{config.data.name} gives {'; '.join(notes)}")
        self.parts = [train, test.subset(rows)]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure if it is this epoch's turn."""
        if trainer.current_epoch + 1 in self.epochs:
            self.add(trainer, pl_module)

    def measure(self, trainer: L.Trainer, module: Any) -> Row:
        """Return accuracies in [0, 1]."""
        transform = evaluation_transform(self.config.data.augmentation.size)
        workers, labelled = self.config.data.num_workers, []
        for images in self.parts:
            assert images.labels is not None
            features = extract_features(
                module.encoder.features, images, transform, device=module.device, num_workers=workers
            )
            labelled += [features, images.labels]
        train_x, train_y, test_x, test_y = labelled
        config = self.config
        measured, _ = accuracies(train_x, train_y, test_x, test_y, ks=(1, 10), probe=config.probe, seed=config.seed)
        return measured


class GradientCurve(Curve):
    """Exact loss and gradient of a run on fixed views, and how far the step's own gradient is from it.

    Args:
        points: how many steps, evenly spaced, besides the first.

    Rows hold ``loss``, the exact global loss; ``gradient``, the squared norm of its gradient at the parameters;
    ``error``, the squared distance of the step's gradient to it; ``collapsed``, the loss if all embeddings were equal.
    """

    def __init__(self, points: int) -> None:
        super().__init__()
        self.points = points

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Measure if it is this step's turn: the weights are those of the step's gradient."""
        total = int(trainer.estimated_stepping_batches)
        if trainer.global_step % max(1, total // self.points) == 0 or trainer.global_step == total - 1:
            self.add(trainer, pl_module)

    def measure(self, trainer: L.Trainer, module: Any) -> Row:
        """Return the exact numbers; the step's gradient is put back."""
        parameters = [parameter for parameter in module.encoder.parameters() if parameter.grad is not None]
        step = [parameter.grad for parameter in parameters]
        module.encoder.zero_grad()
        views: FiniteViews = trainer.datamodule.dataset.views  # type: ignore[attr-defined]

        def embed(samples: Tensor) -> Tensor:
            ids = samples[:, None] * views.num_views + torch.arange(views.num_views)
            embeddings: Tensor = module.encoder(views.take(ids.flatten()).to(module.device))
            return embeddings.view(*ids.shape, -1)

        config = module.config
        mass = objective_mass(config.positive_weight, views.num_samples, trainer.world_size * config.batch_size)
        loss = global_backward(embed, views.num_samples, config.temperature, positive_mass=mass)
        exact = [parameter.grad for parameter in parameters]
        squares = [(own - other).square().sum() for own, other in zip(step, exact, strict=True)]
        for parameter, own in zip(parameters, step, strict=True):
            parameter.grad = own
        return {
            "loss": float(loss),
            "gradient": float(sum(gradient.square().sum() for gradient in exact)),
            "error": float(sum(squares)),
            "collapsed": math.log(views.num_views * (views.num_samples - 1) + mass),
        }


def _peak_memory_mb() -> float:
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return round(peak / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _at_most(images: ImageDataset, count: int | None) -> ImageDataset:
    """Return a random part, the same each time."""
    if count is None or len(images) <= count:
        return images
    return images.subset(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count])
