"""A run from its start to its end, however it ends, and what it leaves behind."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from torch_emc2.config import Config
from torch_emc2.data import BadImageError, ImageDataset, identity
from torch_emc2.error_text import cause
from torch_emc2.locks import only_writer
from torch_emc2.losses import EMC2Loss
from torch_emc2.losses.registry import find
from torch_emc2.models import build_encoder, save_encoder
from torch_emc2.run_folder import keep_finished, prepare_folder, refuse_used, resume_command
from torch_emc2.training.batches import ContrastiveData
from torch_emc2.training.checkpoints import WholeCheckpoints, checkpoint_callbacks
from torch_emc2.training.metrics import MetricsFile, TensorBoardFile
from torch_emc2.training.progress import Progress, made_of
from torch_emc2.training.resume import find_checkpoint, refuse_another, validate_checkpoint
from torch_emc2.training.run_images import first_images, folder_of, own_data, same_images
from torch_emc2.training.step import ContrastiveModule
from torch_emc2.training.stop import StopOnSIGTERM

__all__ = ["train"]

_LOG = logging.getLogger(__name__)


def train(config: Config, *, resume: bool = False, callbacks: Sequence[L.Callback] = ()) -> Path:
    """Train, and return the run's folder.

    It holds config.yaml, versions.json, metrics.csv, TensorBoard's log, checkpoints/ and, once trained,
    encoder.safetensors and head.safetensors (see `torch_emc2.models`).

    Args:
        config: the run.
        resume: go on from the last checkpoint in ``config.out``; before the first, start. With other epochs than the
            run had (no fewer than have begun or were finished), the learning rate is from there on that of a run of so
            many. An encoder that was finished before stays until the new one is, then as encoder-N-epochs.safetensors.
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
        rank_zero_only(refuse_used)(run)  # before the work: views may have to be drawn
    find(config.loss)  # likewise: a class of the user's own may not be there, nor a backbone or its weights
    build_encoder(config.model, config.data.channels or 3, config.data.augmentation.size)
    checkpoint = find_checkpoint(run) if resume else None
    data = own_data(config.data, run) if resume else config.data
    images = first_images(replace(config, data=data), run) if checkpoint is None else same_images(config, run)
    known = identity(images)
    L.seed_everything(config.seed, verbose=False)
    module = ContrastiveModule(config, images.channels, len(images))
    datamodule = _data(config, images, module)
    trainer = _trainer(config, run, [*checkpoint_callbacks(config, run / "checkpoints"), *callbacks, stop])
    every = min(config.log_every_steps, module.steps_per_epoch(trainer.world_size))
    trainer.log_every_n_steps = every  # type: ignore[attr-defined]  # which knows its processes only now
    value_range = images.decoding and images.decoding.value_range
    facts = {"processes": trainer.world_size, "images": known, "value_range": value_range, "folder": folder_of(data)}
    if resume and trainer.is_global_zero:
        refuse_another(config, run, facts, checkpoint)
    if checkpoint is not None:
        validate_checkpoint(checkpoint, module)
    if trainer.is_global_zero:  # after all that can be refused: nothing is in the way of another try
        prepare_folder(config, run, facts, checkpoint)
        if resume and checkpoint is None:
            print(f"emc2: {run} has no checkpoint to go on from: starting", file=sys.stderr)
        for line in made_of(config, images, module, trainer):
            _LOG.info("%s", line)
    if trainer.world_size > 1:
        stop.meet()
    with _saying_how_to_go_on(run, trainer.global_rank, lambda: identity(images) == known):
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        keep_finished(run, config.epochs)
        save_encoder(module.encoder, run)
    return run


def _data(config: Config, images: ImageDataset, module: ContrastiveModule) -> ContrastiveData:
    carried_ids = None
    if isinstance(module.loss, EMC2Loss) and module.loss.carry == "encode":
        carried_ids = module.loss.chains.ids.share_memory()  # where the loader's workers read them
    try:
        return ContrastiveData(config, images, carried_ids)
    except BadImageError as error:  # while finite views are drawn
        raise BadImageError(f"{error}: mend or remove it, or leave it out by --data.on_bad_image skip") from error


@contextlib.contextmanager
def _saying_how_to_go_on(run: Path, rank: int, all_there: Callable[[], bool]) -> Iterator[None]:
    """Add to what stops a run how it goes on; ``all_there`` tells whether its images are still those that it had."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            message = f"rank {rank} waited for one that has ended; that one's own error says why"
            raise ConnectionError(message) from error
        error.args = (f"{cause(error)}; {_going_on(run)}",)
        raise
    except (ConnectionError, EOFError) as error:  # what may be seen first of a worker that was killed
        raise RuntimeError(f"DataLoader worker ended: {cause(error)}; {_going_on(run)}") from error
    except BadImageError as error:  # that was readable at the start, or seemed so
        on = resume_command(run)
        if all_there():
            raise BadImageError(f"{error}: {on} --data.on_bad_image skip goes on without it") from error
        raise BadImageError(f"{error}: put back all images as they were, then {on} goes on") from error
    except SIGTERMException:
        raise
    except SystemExit:  # what Lightning makes of Ctrl-C, after which it ignores any other
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt(_going_on(run)) from None


def _going_on(run: Path) -> str:
    there = any((run / "checkpoints").glob("[!.]*"))
    return f"{resume_command(run)} " + (
        "goes on from the last checkpoint" if there else "starts again: no checkpoint yet"
    )


def _trainer(config: Config, run: Path, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """Build Lightning's trainer.

    Raises:
        ValueError: this machine does not have the accelerator, or so many devices.
    """
    unused = config.optimizer.freeze_epochs > 0 and config.devices != 1  # ranks would wait for frozen gradients
    try:
        return L.Trainer(
            max_epochs=config.epochs,
            accelerator=config.accelerator,
            devices=config.devices,
            strategy="ddp_find_unused_parameters_true" if unused else "auto",
            precision=config.precision,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.optimizer.clip,
            logger=TensorBoardFile(run, name="", version="tensorboard"),
            callbacks=[MetricsFile(run / "metrics.csv"), Progress(sys.stdout.isatty()), *callbacks],
            plugins=[WholeCheckpoints()],
            use_distributed_sampler=False,  # the sampler knows its rank
            enable_progress_bar=False,
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
