"""The batches of a run, from where it stands."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from torch_emc2.config import Config
from torch_emc2.data import (
    Batch,
    ContrastiveDataset,
    EpochSampler,
    FiniteDataset,
    ImageDataset,
    RandomView,
    Undrawn,
    UndrawnDataset,
    decoded_once,
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
        if data.decode_once:
            folder = Path(data.root) / "decoded"
            workers = data.num_workers
            images = decoded_once(images, folder=folder, on_bad_image=data.on_bad_image, num_workers=workers)
        self.dataset: ContrastiveDataset | UndrawnDataset | FiniteDataset
        if data.augment == "device":
            self.dataset = UndrawnDataset(
                images,
                data.augmentation,
                seed=config.seed,
                carried_ids=carried_ids,
                on_bad_image=data.on_bad_image,
            )
        elif data.finite_views is None:
            self.dataset = ContrastiveDataset(
                images,
                RandomView(data.augmentation),
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

    def train_dataloader(self) -> DataLoader[Any]:
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

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave ids where the host can read them without waiting for a GPU."""
        return super().transfer_batch_to_device(batch, device, dataloader_idx)._replace(index=batch.index)

    def on_after_batch_transfer(self, batch: Batch | Undrawn, dataloader_idx: int) -> Batch:
        """Draw views that are drawn on the device."""
        if isinstance(batch, Batch):
            return batch
        assert isinstance(self.dataset, UndrawnDataset)
        assert self.trainer is not None
        drawn: Batch = self.trainer.precision_plugin.convert_input(self.dataset.draw(batch))
        return drawn


def _least_ranks(config: Config) -> int:
    return 1 if config.devices == "auto" else config.devices


def _outlive_sigterm(worker: int) -> None:
    """Let a worker go on with the step at hand: a cluster signals all processes of a job."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
