"""The batches of a run, from where it stands."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from torch_emc2.config import Config
from torch_emc2.data import (
    Batch,
    ContrastiveDataset,
    EpochSampler,
    FiniteDataset,
    ImageDataset,
    finite_views,
    make_loader,
)

__all__ = ["ContrastiveData"]


class ContrastiveData(L.LightningDataModule):
    """Batches of two views; a resumed run goes on with the batch that would have come next."""

    def __init__(self, config: Config, images: ImageDataset, carried_ids: Tensor | None) -> None:
        super().__init__()
        self.config = config
        # Refuses a batch larger than the data, before ranks are launched.
        EpochSampler(len(images), config.batch_size, config.seed, world_size=_least_ranks(config))
        data = config.data
        self.dataset: ContrastiveDataset | FiniteDataset
        if data.finite_views is None:
            self.dataset = ContrastiveDataset(
                images,
                data.augmentation.transform(),
                seed=config.seed,
                carried_ids=carried_ids,
                on_bad_image=data.on_bad_image,
            )
        else:
            views = finite_views(
                images,
                data.augmentation,
                data.finite_views,
                seed=config.seed,
                folder=Path(data.root) / "views",
                name=data.name,
                on_bad_image=data.on_bad_image,
                num_workers=data.num_workers,
            )
            self.dataset = FiniteDataset(views, seed=config.seed, carried_ids=carried_ids)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader, placed after the steps that the trainer has already taken."""
        trainer, config = self.trainer, self.config
        assert trainer is not None
        sampler = EpochSampler(
            len(self.dataset), config.batch_size, config.seed, rank=trainer.global_rank, world_size=trainer.world_size
        )
        epoch, steps = divmod(trainer.global_step, math.ceil(sampler.batches / config.accumulate))
        sampler.set_epoch(epoch)
        sampler.skip(steps * config.accumulate)
        pin = trainer.strategy.root_device.type == "cuda"
        loader = make_loader(self.dataset, sampler, config.batch_size, config.data.num_workers, pin_memory=pin)
        loader.worker_init_fn = _outlive_sigterm
        return loader


def _least_ranks(config: Config) -> int:
    return 1 if config.devices == "auto" else config.devices


def _outlive_sigterm(worker: int) -> None:
    """Let a worker go on with the step at hand: a cluster signals all processes of a job."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
