"""What data sets of batches share: what of a batch can be read, and what its chains carry."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from torch_emc2.data.errors import BadImageError, DataError

__all__ = ["CARRIED_VIEW", "carried_by", "read_all", "require_two", "shared"]

CARRIED_VIEW = 2  # of a sample: 0 and 1 are a batch's two

T = TypeVar("T")


def read_all(
    keys: Sequence[tuple[int, int]], read: Callable[[int], T], on_bad_image: Literal["raise", "skip"]
) -> tuple[Tensor, list[T]]:
    """Read what each key (epoch, index) is of: the indices that can be read, and what is read.

    Raises:
        BadImageError: an image is unreadable, and not to be skipped.
        DataError: fewer than two are readable.
    """
    index, found, error = [], [], None
    for _, i in keys:
        try:
            found.append(read(i))
            index.append(i)
        except BadImageError as bad:
            if on_bad_image == "raise":
                raise
            error = bad
    if error is not None:
        require_two(len(index), len(keys), error)
    return torch.tensor(index), found


def shared(carried_ids: Tensor | None, count: int, what: str) -> Tensor | None:
    """Move ids (count, chains) to shared memory, in place."""
    if carried_ids is not None:
        if len(carried_ids) != count:
            raise DataError(f"carried_ids has {len(carried_ids)} rows for {count} {what}s; give it one a {what}")
        carried_ids.share_memory_()  # type: ignore[no-untyped-call]
    return carried_ids


def carried_by(index: Tensor, carried_ids: Tensor | None) -> Tensor:
    """Return the ids (k,) that the chains of ``index`` carry, each once, ascending."""
    if carried_ids is None:
        return torch.empty(0, dtype=torch.int64)
    ids = carried_ids[index].long()
    carried: Tensor = torch.unique(ids[ids >= 0])
    return carried


def require_two(readable: int, size: int, error: object) -> None:
    """Raise DataError where too few images of a batch can be read."""
    if readable < 2:
        raise DataError(f"{readable} of the {size} images of a batch can be read, 2 are needed: {error}")
