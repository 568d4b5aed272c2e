"""What a loss must be to be used in another library's trainer."""

from __future__ import annotations

from torch import nn

from torch_emc2.losses import ContrastiveLoss

__all__ = ["require_loss", "require_model"]


def require_loss(loss: object) -> None:
    """Raise TypeError if ``loss`` is no loss of this library, ValueError if it needs what a trainer does not give."""
    if not isinstance(loss, ContrastiveLoss):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"loss must be a loss of torch_emc2, such as InfoNCELoss(0.1), got {got}")
    if loss.needs_slow:
        raise ValueError(
            f"the trainer has no momentum encoder, as {type(loss).__name__} needs: write a loop of your own"
        )
    if getattr(loss, "carry", "").startswith("encode"):
        raise ValueError(
            f'the trainer cannot encode what chains carry, as carry="{loss.carry}" needs: build with "cache"'
        )


def require_model(model: object, call: str) -> None:
    """Raise TypeError where a model is no such, as in a call with a loss alone; ``call`` shows the right one."""
    if not isinstance(model, nn.Module) or isinstance(model, ContrastiveLoss):
        raise TypeError(f"model must be the model that is trained, got {type(model).__name__}: {call}")
