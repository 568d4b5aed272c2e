"""The training step: encoder, loss and optimiser."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning as L
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torch_emc2.config import Config
from torch_emc2.data import Batch
from torch_emc2.losses import ContrastiveLoss, ema_decay
from torch_emc2.losses.registry import LossContext, find
from torch_emc2.models import Encoder, build_encoder
from torch_emc2.seeds import mix_seed

__all__ = ["ContrastiveModule", "build_loss"]

_NAMED = 64  # samples, in a message


def build_loss(config: Config, num_samples: int) -> ContrastiveLoss:
    """Build the loss that a config names, for a data set of ``num_samples``; finite views have an entry each."""
    views = config.data.finite_views or 1
    row = find(config.loss)
    given = LossContext(
        views * num_samples, config.temperature, config.model.out_dim, views, config.seed, config.positive_weight
    )
    return row.build(getattr(config, row.group, None), given)


class ContrastiveModule(L.LightningModule):
    """Encoder and loss, and a momentum encoder where the loss needs one; all memory is part of the checkpoint.

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
        self.slow_encoder: AveragedModel | None = None
        if self.loss.needs_slow:
            self.slow_encoder = AveragedModel(self.encoder).requires_grad_(False)  # of a decay, below
        self.num_samples = num_samples
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))  # unreadable images met so far
        if config.channels_last:
            for encoder in self._encoders():
                encoder.to(memory_format=torch.channels_last)
        if config.precision == "64-true":
            self.double()  # Lightning does so after a checkpoint's weights have been loaded, and rounded

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Count the optimiser's steps in an epoch."""
        batches = self.num_samples // (self.config.batch_size * world_size)
        return math.ceil(batches / self.config.accumulate)

    def decay(self, world_size: int = 1) -> float:
        """Return the momentum encoder's decay, by default that of the samples in a step."""
        samples = self.config.batch_size * self.config.accumulate * world_size
        return self.config.momentum.decay or ema_decay(samples)

    def on_train_start(self) -> None:
        """Take the rate of this run's schedule, where the checkpoint's was that of fewer epochs; and a step's decay."""
        schedule = cast(torch.optim.lr_scheduler.LambdaLR, self.lr_schedulers())
        for group, base, factor in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
        if self.slow_encoder is not None:
            average = get_ema_multi_avg_fn(self.decay(self.trainer.world_size))  # type: ignore[no-untyped-call]
            self.slow_encoder.multi_avg_fn = average

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make a resumed run the same: dropout and its like, and what is frozen, depend on the place in training."""
        for encoder in self._encoders():
            encoder.freeze(self.current_epoch < self.config.optimizer.freeze_epochs)
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

        further: dict[str, Any] = {}
        if self.slow_encoder is not None:
            with torch.no_grad():
                further["slow"] = self.slow_encoder(torch.cat([batch.first, batch.second])).split(size)
        try:
            loss: Tensor = self.loss(z1, z2, batch.index, encode=encode, **further)
        except ValueError as error:
            broken = ~torch.stack([z1, z2, *further.get("slow", ())]).isfinite().all(2).all(0)
            rows = f"; {self._samples(batch.index[broken.cpu()])}" if broken.any() else ""
            error.args = (f"step {self.trainer.global_step}: {error}{rows}",)
            raise
        if batch_idx % self.config.accumulate == 0:
            self._step_index = []
        self._step_index.append(batch.index)
        numbers = {"loss": loss.detach(), **self.loss.last}
        means = self.trainer.strategy.reduce(torch.stack(list(numbers.values())), reduce_op="mean")  # over ranks
        self.numbers = dict(zip(numbers, cast(Tensor, means), strict=True))
        if not self.numbers["loss"].isfinite():
            raise self._not_finite("loss", batch.index, self.numbers)
        if self.config.data.on_bad_image == "skip":
            skipped = torch.tensor(batch.skipped, device=self.device)
            self.skipped += cast(Tensor, self.trainer.strategy.reduce(skipped, reduce_op="sum"))
        if self._is_logged():
            self._log_numbers()
        # Lightning divides by accumulate in an epoch's last step too, which may have fewer batches.
        batches, accumulate = cast(int, self.trainer.num_training_batches), self.config.accumulate
        left = batches % accumulate
        return loss * (accumulate / left) if batch_idx >= batches - left else loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the momentum encoder follow."""
        super().optimizer_step(*args, **kwargs)
        if self.slow_encoder is not None:
            self.slow_encoder.update_parameters(self.encoder)

    def _encoders(self) -> list[Encoder]:
        return [self.encoder] if self.slow_encoder is None else [self.encoder, cast(Encoder, self.slow_encoder.module)]

    def _is_logged(self) -> bool:
        """Tell whether anything reads this step's numbers: Lightning takes milliseconds to log them."""
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % every == 0 or self.trainer.is_last_batch

    def _log_numbers(self) -> None:
        for name, value in self.numbers.items():
            self.log(name, value, prog_bar=name in ("loss", "acceptance", "carried_share"))
        self.log("lr", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]
        if self.config.data.on_bad_image == "skip":
            self.log("skipped", self.skipped.float(), prog_bar=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a gradient that is not finite, unless it is the scaling of fp16 that overflows."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.encoder.parameters() if p.grad is not None])
        if not norm.isfinite():
            raise self._not_finite("gradient", torch.cat(self._step_index), self.numbers | {"gradient_norm": norm})

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

    def _two_rates(self) -> list[dict[str, Any]]:
        """Group weights by rate, and as timm does by weight decay; the head's come first, whose rate is logged."""
        own = self.config.optimizer
        rates = {self.encoder.head: own.lr, self.encoder.backbone: own.lr * own.backbone_lr_scale}
        return [
            group | {"lr": rate}
            for part, rate in rates.items()
            for group in param_groups_weight_decay(part, own.weight_decay)
        ]

    def configure_optimizers(self) -> Any:
        """Return the optimiser with linear warm-up and half a cosine, a step at a time."""
        own = self.config.optimizer
        name = {"sgd": "momentum"}.get(own.name, own.name)  # timm's "sgd" is Nesterov's
        # One kernel for all weights. With fp16 it would unscale gradients itself, after they are to be clipped.
        fused: dict[str, Any] = {"fused": True} if own.name != "lars" and self.config.precision != "16-mixed" else {}
        optimizer = create_optimizer_v2(
            self.encoder if own.backbone_lr_scale == 1 else self._two_rates(),
            opt=name,
            lr=own.lr,
            weight_decay=own.weight_decay,
            momentum=own.momentum,
            **fused,
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
