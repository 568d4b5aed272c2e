"""A loss for open_clip's training step, instead of its `ClipLoss`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from torch_emc2.integrations.checks import require_loss, require_model
from torch_emc2.integrations.text_ids import text_ids
from torch_emc2.losses import ContrastiveLoss, EMC2Loss
from torch_emc2.ranks import several_ranks

__all__ = ["EMC2ClipLoss"]


class EMC2ClipLoss(nn.Module):
    """A contrastive loss of images and their texts, by any loss of this library, with the model's own ``logit_scale``.

    A pair's id is a hash of its text's tokens, which a hook on the model's forward pass reads. Pairs with equal
    captions are therefore the same item on both sides, and no negatives of each other. While the model is in evaluation
    mode, or without gradient, no chain moves. ``state_dict()`` has the loss's memory and not the model: save it with
    the optimiser's.

    Args:
        model: open_clip's model, or the module it is wrapped in, whose forward pass is given the texts.
        loss: a loss of this library with ``towers=2`` and ``num_samples=None`` that needs neither a momentum encoder
            nor ``encode``; by default ``EMC2Loss(None, towers=2)``. ``InfoNCELoss(towers=2)`` equals `ClipLoss`. Its
            temperature is not used.
        local_loss: accepted as for `ClipLoss`, and ignored: several processes gather their batches, with gradient.
        gather_with_grad: likewise.
        cache_labels: likewise.
        rank: likewise.
        world_size: likewise; if there are several processes, their process group must be initialised.
        use_horovod: refused.

    Example::

        >>> loss = EMC2ClipLoss(model)
        >>> losses = loss(**model(images, texts), output_dict=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        loss: ContrastiveLoss | None = None,
        *,
        local_loss: bool = True,
        gather_with_grad: bool = True,
        cache_labels: bool = True,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.loss = EMC2Loss(None, towers=2) if loss is None else loss
        require_model(model, "EMC2ClipLoss(model, loss)")
        require_loss(self.loss)
        if self.loss.towers != 2 or any(size is not None for size in self.loss.sizes):
            raise ValueError(
                f"images and texts are two towers, with hashes for ids; got {self.loss}: build it with towers=2 and "
                "num_samples=None"
            )
        if use_horovod or (world_size > 1 and not several_ranks()):
            raise ValueError(
                f"world_size={world_size}, use_horovod={use_horovod}: the loss gathers by torch.distributed, whose "
                "process group must be initialised before"
            )
        self._seen = _Seen()
        hook = model.register_forward_pre_hook(self._seen, with_kwargs=True)
        weakref.finalize(self, hook.remove)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of the features that the model has just returned; ``logit_bias`` cancels out of it."""
        if self._seen.texts is None or len(self._seen.texts) != len(text_features):
            seen = "none" if self._seen.texts is None else len(self._seen.texts)
            raise ValueError(
                f"{len(text_features)} text features, and texts in the model's last forward pass: {seen}. Call the "
                "loss once after each model(images, texts), with accum_freq=1"
            )
        self.loss.train(self._seen.training and torch.is_grad_enabled())
        loss: Tensor = self.loss(image_features, text_features, text_ids(self._seen.texts), logit_scale=logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss


class _Seen:
    """A hook that keeps what the model's last forward pass was given.

    A copy of the model alone has one of its own, which no loss reads; a copy of model and loss shares one.
    """

    def __init__(self) -> None:
        self.texts: Tensor | None = None
        self.training = True

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.texts = kwargs["text"] if "text" in kwargs else args[1] if len(args) > 1 else None
        self.training = model.training

    def __getstate__(self) -> dict[str, Any]:
        return {"texts": None, "training": True}
