"""Embeddings of the negatives that the rows' chains carry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_emc2.geometry import Contrast
from torch_emc2.losses.encode import CheckedEncode
from torch_emc2.losses.weighting import Carried

__all__ = ["CarriedVectors", "encode_carried"]


@dataclass(frozen=True)
class CarriedVectors:
    """Carried negatives' embeddings.

    Attributes:
        vectors: (rows, chains, d) unit vectors, detached; arbitrary for an empty chain, which has no weight.
        encoded: (k, d) the vectors that ``vectors`` holds copies of, if they may have a gradient; else None.
        place: (rows, chains) which row of ``encoded`` each one is.
    """

    vectors: Tensor
    encoded: Tensor | None = None
    place: Tensor | None = None

    def similarities(self, rows: Tensor) -> Tensor:
        """Return each row's similarities to its carried negatives: (rows, chains)."""
        return torch.bmm(self.vectors, rows[:, :, None])[:, :, 0]

    def weighed(self, weight: Tensor) -> Carried:
        """Return the carried negatives with weights (rows, chains)."""
        return Carried(self.vectors, weight, self.encoded, self.place)


def encode_carried(
    contrast: Contrast, carried: Tensor, wanted: Tensor, anywhere: bool, encode: CheckedEncode | None
) -> CarriedVectors | None:
    """Encode each id of ``carried`` (rows, chains) that is ``wanted``, once; None if no rank wants any.

    ``anywhere`` says whether any rank does. A rank that wants none then encodes a stand-in that no chain carries.
    """
    if not anywhere:
        return None
    ids, place_of_wanted = torch.unique(carried[wanted], return_inverse=True)
    ids = contrast.some_ids(ids)
    with contrast.ranks.together():
        assert encode is not None
        encoded = encode(ids)
    place = torch.zeros_like(carried).masked_scatter_(wanted, place_of_wanted)
    return CarriedVectors(encoded.detach()[place], encoded, place)
