"""What a loss must be to be used in another library's trainer."""

from __future__ import annotations

from torch_emc2.losses import ContrastiveLoss

__all__ = ["require_loss"]


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
