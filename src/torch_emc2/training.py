"""Pre-training an encoder, with Lightning: the step, the data, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils.data import DataLoader

from torch_emc2.callbacks import EpochLines, KeptCheckpoints, MetricsFile, ProgressBar, StopOnSIGTERM, WholeCheckpoints
from torch_emc2.config import Config
from torch_emc2.data import (
    BadImageError,
    Batch,
    ContrastiveDataset,
    EpochSampler,
    FiniteDataset,
    ImageDataset,
    finite_views,
    identity,
    make_loader,
)
from torch_emc2.files import cause
from torch_emc2.locks import only_writer
from torch_emc2.losses import (
    ContrastiveLoss,
    DCLLoss,
    EMC2Loss,
    InfoNCELoss,
    NegativeCacheLoss,
    SogCLRLoss,
)
from torch_emc2.models import build_encoder, save_encoder
from torch_emc2.run_folder import find_checkpoint, prepare_folder, refuse_used, resume_command, validate_checkpoint
from torch_emc2.run_images import first_images, same_images
from torch_emc2.seeds import mix_seed

__all__ = ["ContrastiveData", "ContrastiveModule", "build_loss", "train"]

_NAMED = 64  # samples, in a message


def build_loss(config: Config, num_samples: int) -> ContrastiveLoss:
    """Build the loss that a config names, for a data set of ``num_samples``; finite views have an entry each."""
    num_views = config.data.finite_views or 1
    num_samples *= num_views
    match config.loss:
        case "emc2":
            own = config.emc2
            return EMC2Loss(
                num_samples,
                config.temperature,
                burn_in=own.burn_in,
                num_chains=own.num_chains,
                carry=own.carry,
                kernel=own.kernel,
                seed=config.seed,
            )
        case "infonce":
            return InfoNCELoss(config.temperature)
        case "dcl":
            return DCLLoss(config.temperature)
        case "sogclr":
            return SogCLRLoss(num_samples, config.temperature, config.sogclr.gamma)
        case "negative-cache":
            return NegativeCacheLoss(
                num_samples,
                config.model.out_dim,
                config.temperature,
                refresh_fraction=config.negative_cache.refresh_fraction,
                views_per_sample=num_views,
                seed=config.seed,
            )


class ContrastiveModule(L.LightningModule):
    """Encoder and loss; the loss's memory of every sample is part of the checkpoint.

    A loss or gradient that is not finite stops the run before the weights change, and with them the last checkpoint.
    Where fp16 overflows and the scaler skips the optimiser's step, chains have moved and weights have not. That is
    consistent: their states are draws at the weights of this step, which still are today's.
    """

    skipped: Tensor

    def __init__(self, config: Config, channels: int, num_samples: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.model, channels, config.data.augmentation.size)
        self.loss = build_loss(config, num_samples)
        self.num_samples = num_samples
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))  # unreadable images met so far

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Count the optimiser's steps in an epoch."""
        batches = self.num_samples // (self.config.batch_size * world_size)
        return math.ceil(batches / self.config.accumulate)

    def on_train_start(self) -> None:
        """Take the rate of this run's schedule, where the checkpoint's was that of fewer epochs."""
        schedule = cast(torch.optim.lr_scheduler.LambdaLR, self.lr_schedulers())
        for group, base, factor in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout and its like a function of the place in training, so that a resumed run draws the same."""
        torch.manual_seed(mix_seed(self.config.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Embed both views and the carried negatives that came with them, and compare."""
        size = len(batch.index)
        embeddings = self.encoder(torch.cat([batch.first, batch.second, batch.carried]))
        z1, z2, carried = embeddings.split([size, size, len(batch.carried)])

        def encode(ids: Tensor) -> Tensor:
            place = torch.searchsorted(batch.carried_ids, ids)
            if len(carried) and torch.equal(batch.carried_ids[place.clamp(max=len(carried) - 1)], ids):
                return cast(Tensor, carried[place])
            views = self.trainer.datamodule.dataset.encode_inputs(batch.epoch, ids)  # type: ignore[attr-defined]
            # Batch norm's statistics of a handful of images are no statistics: such go in the batch's company.
            company = batch.first if self.config.model.norm == "batch" and len(ids) < size else batch.first[:0]
            return cast(Tensor, self.encoder(torch.cat([views.to(batch.first), company]))[: len(ids)])

        try:
            loss: Tensor = self.loss(z1, z2, batch.index, encode)
        except ValueError as error:
            broken = ~torch.stack([z1, z2]).isfinite().all(2).all(0)
            rows = f"; {self._samples(batch.index[broken])}" if broken.any() else ""
            error.args = (f"step {self.trainer.global_step}: {error}{rows}",)
            raise
        if batch_idx % self.config.accumulate == 0:
            self._step_index = []
        self._step_index.append(batch.index)
        numbers = {"loss": loss.detach(), **self.loss.last}
        means = self.trainer.strategy.reduce(torch.stack(list(numbers.values())), reduce_op="mean")  # over ranks
        self._numbers = dict(zip(numbers, cast(Tensor, means), strict=True))
        if not self._numbers["loss"].isfinite():
            raise self._not_finite("loss", batch.index, self._numbers)
        for name, value in self._numbers.items():
            self.log(name, value, prog_bar=name in ("loss", "acceptance", "carried_share"))
        self.log("lr", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]
        if self.config.data.on_bad_image == "skip":
            skipped = torch.tensor(batch.skipped, device=self.device)
            self.skipped += cast(Tensor, self.trainer.strategy.reduce(skipped, reduce_op="sum"))
            self.log("skipped", self.skipped.float(), prog_bar=True)
        # Lightning divides by accumulate in an epoch's last step too, which may have fewer batches.
        batches, accumulate = cast(int, self.trainer.num_training_batches), self.config.accumulate
        left = batches % accumulate
        return loss * (accumulate / left) if batch_idx >= batches - left else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a gradient that is not finite, unless it is the scaling of fp16 that overflows."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.encoder.parameters() if p.grad is not None])
        if not norm.isfinite():
            raise self._not_finite("gradient", torch.cat(self._step_index), self._numbers | {"gradient_norm": norm})

    def _not_finite(self, what: str, index: Tensor, numbers: dict[str, Tensor]) -> ValueError:
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in numbers.items())
        return ValueError(
            f"step {self.trainer.global_step}: the {what} is not finite ({shown}; {self._samples(index)}); "
            "the last checkpoint is from before: look at these images, or start a run with a lower optimizer.lr"
        )

    def _samples(self, index: Tensor) -> str:
        """Name the samples that ids, of them or of their views, belong to; the first of many."""
        ids = index if index.ndim == 1 else index[:, 0] // cast(int, self.config.data.finite_views)
        return f"samples {', '.join(map(str, ids[:_NAMED].tolist()))}{', …' if len(ids) > _NAMED else ''}"

    def configure_optimizers(self) -> Any:
        """Return the optimiser with linear warm-up and half a cosine, a step at a time."""
        own = self.config.optimizer
        name = {"sgd": "momentum"}.get(own.name, own.name)  # timm's "sgd" is Nesterov's
        optimizer = create_optimizer_v2(
            self.encoder, opt=name, lr=own.lr, weight_decay=own.weight_decay, momentum=own.momentum
        )
        # Lightning's estimate would load the data before the steps of a resumed run are known, and so from the start.
        total = self.config.epochs * self.steps_per_epoch(self.trainer.world_size)
        warmup = round(total * own.warmup_epochs / self.config.epochs)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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


def train(config: Config, *, resume: bool = False, callbacks: Sequence[L.Callback] = ()) -> Path:
    """Train, and return the run's folder.

    It holds config.yaml, versions.json, metrics.csv, TensorBoard's log, checkpoints/ and, once trained,
    encoder.safetensors and head.safetensors (see `torch_emc2.models`).

    Args:
        config: the run.
        resume: go on from the last checkpoint in ``config.out``; before the first, start. With more epochs than the run
            had, the learning rate is from there on that of a run of so many.
        callbacks: Lightning's, besides the run's own.

    Raises:
        DataError: the images are not there.
        FileExistsError: ``config.out`` is not empty and ``resume`` is not set.
        ValueError: the run there has another config, or this machine does not have the accelerator.
            Or a step is not finite: its message has the step, its samples and numbers. Or the run has results, and no
            checkpoint to go on from.
        OSError: a file cannot be written; those before are kept. Or (ConnectionError) another rank has ended, or
            (BlockingIOError) another process trains in that folder.
        RuntimeError: of whatever else stopped the run, such as memory or a loader's worker that was killed; what the
            last checkpoint has is kept. Its message says how to go on. So does a MemoryError's.
        KeyboardInterrupt: by Ctrl-C; what the last checkpoint has is kept. Its message says how to go on.
        SystemExit: by SIGTERM, with status 0: the step at hand is finished and saved, a line says how to go on. Of
            several processes, those that still wait for one another at the start are ended by the signal.
    """
    run = Path(config.out)
    stop = StopOnSIGTERM(run)
    alone = only_writer(run) if rank_zero_only.rank == 0 else contextlib.nullcontext()  # type: ignore[attr-defined]
    with _hushed(), stop, alone:
        return _train(config, resume, callbacks, stop)


def _train(config: Config, resume: bool, callbacks: Sequence[L.Callback], stop: StopOnSIGTERM) -> Path:
    run = Path(config.out)
    if not resume:
        refuse_used(run)  # before the work: views may have to be drawn
    checkpoint = find_checkpoint(run) if resume else None
    config, images = first_images(config, run) if checkpoint is None else same_images(config, run)
    known = identity(images)
    L.seed_everything(config.seed, verbose=False)
    module = ContrastiveModule(config, images.channels, len(images))
    carried_ids = None
    if isinstance(module.loss, EMC2Loss) and module.loss.carry == "encode":
        carried_ids = module.loss.chains.ids.share_memory()  # where the loader's workers read them
    try:
        datamodule = ContrastiveData(config, images, carried_ids)
    except BadImageError as error:  # while finite views are drawn
        raise BadImageError(f"{error}: mend or remove it, or leave it out by --data.on_bad_image skip") from error
    trainer = _trainer(config, run, [*_checkpoints(config, run / "checkpoints"), *callbacks, stop])
    every = min(config.log_every_steps, module.steps_per_epoch(trainer.world_size))
    trainer.log_every_n_steps = every  # type: ignore[attr-defined]  # which knows its processes only now
    if trainer.is_global_zero:  # after all that can be refused: nothing is in the way of another try
        facts = {"processes": trainer.world_size, "images": known}
        prepare_folder(config, run, facts, resume=resume, checkpoint=checkpoint)
        if resume and checkpoint is None:
            print(f"emc2: {run} has no checkpoint to go on from: starting", file=sys.stderr)
    if checkpoint is not None:
        validate_checkpoint(checkpoint, module)
    if trainer.world_size > 1:
        stop.meet()
    try:
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            rank = f"rank {trainer.global_rank}"
            raise ConnectionError(f"{rank} waited for one that has ended; that one's own error says why") from error
        error.args = (f"{cause(error)}; {resume_command(run)} goes on from the last checkpoint",)
        raise
    except BadImageError as error:  # that was readable at the start, or seemed so
        on = resume_command(run)
        if identity(images) == known:
            raise BadImageError(f"{error}: {on} --data.on_bad_image skip goes on without it") from error
        raise BadImageError(f"{error}: put back all images as they were, then {on} goes on") from error
    except SIGTERMException:
        raise
    except SystemExit:  # what Lightning makes of Ctrl-C, after which it ignores any other
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt(f"{resume_command(run)} goes on from the last checkpoint") from None
    if trainer.is_global_zero:
        save_encoder(module.encoder, run)
    return run


def _trainer(config: Config, run: Path, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """Build Lightning's trainer.

    Raises:
        ValueError: this machine does not have the accelerator, or so many devices.
    """
    interactive = sys.stdout.isatty()
    shown = ProgressBar(refresh_rate=10) if interactive else EpochLines()
    try:
        return L.Trainer(
            max_epochs=config.epochs,
            accelerator=config.accelerator,
            devices=config.devices,
            precision=config.precision,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.optimizer.clip,
            logger=TensorBoardLogger(run, name="", version="tensorboard"),
            callbacks=[MetricsFile(run / "metrics.csv"), shown, *callbacks],
            plugins=[WholeCheckpoints()],
            use_distributed_sampler=False,  # the sampler knows its rank
            enable_progress_bar=interactive,
            enable_model_summary=False,
            default_root_dir=run,
        )
    except MisconfigurationException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{reason} (accelerator: {config.accelerator}, devices: {config.devices})") from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep Lightning from telling of hardware, of every end of a fit, and of what is meant to be as it is."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    expected = "does not have many workers|LeafSpec|dataloader is not resumable|exists and is not empty"
    changed = "callbacks used to create the checkpoint|dirpath has changed"  # a resumed run's settings or folder
    skipped = r"Detected call of `lr_scheduler\.step"  # by fp16's scaler, in the first step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*({expected}|{changed}|{skipped}).*")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _checkpoints(config: Config, folder: Path) -> list[L.Callback]:
    """Return what renews last.ckpt at the end of each epoch, and the config's own checkpoints."""
    renew = partial(ModelCheckpoint, folder, "last", enable_version_counter=False)
    keep = partial(KeptCheckpoints, folder, "epoch-{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    callbacks: list[L.Callback] = [renew(every_n_epochs=1, save_on_train_epoch_end=True)]
    if config.checkpoint_every_steps is not None:
        callbacks.append(renew(every_n_train_steps=config.checkpoint_every_steps))
    if config.checkpoint_every_epochs is not None:
        callbacks.append(keep(every_n_epochs=config.checkpoint_every_epochs, save_on_train_epoch_end=True))
    return callbacks
