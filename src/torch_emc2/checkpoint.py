"""A checkpoint that a run has left."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from torch_emc2.error_text import cause

__all__ = ["load_checkpoint"]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of a run, memory-mapped.

    Raises:
        ValueError: it is damaged, or none of ours.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):  # torch would advise to save it in another way
                raise ValueError("no checkpoint, or a part of one")
        import torch  # which nothing else here needs, nor the command while its arguments are wrong

        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if (
            not isinstance(checkpoint, dict)
            or not {"pytorch-lightning_version", "epoch", "global_step", "state_dict"} <= checkpoint.keys()
        ):
            raise ValueError("no checkpoint of a run")
    except Exception as error:  # whatever unpickling makes of foreign bytes
        raise ValueError(
            f"{path} is damaged ({cause(error)[:200]}): put another checkpoint in its place, "
            "or remove it to go on from the newest that is left"
        ) from error
    return checkpoint
