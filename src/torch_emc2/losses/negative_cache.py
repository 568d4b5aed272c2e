"""Negative Cache: one negative a row, drawn from the softmax over cached embeddings of the whole data set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_emc2.losses.base import Carried, Encode, StatefulLoss, Weights, log_sum_exp
from torch_emc2.losses.noise import exponential_noise
from torch_emc2.pairs import Pairs
from torch_emc2.tables import SampleTable

__all__ = ["NegativeCacheLoss"]

_NEVER = -1


class NegativeCacheLoss(StatefulLoss):
    """Cached negatives drawn by the Gumbel-max trick (Lindgren et al. 2021).

    The loss keeps one embedding a sample. Each step the batch's embeddings enter the cache, the oldest entries are
    encoded anew, and each row draws one negative from the softmax over all cached entries of other samples. Weights:
    ``1 - w_pos`` at the drawn negative, with ``w_pos`` the positive's softmax against the cache.

    Args:
        num_samples: size of the data set (of its views, with an id a view).
        dim: dimension d of the embeddings; the cache is num_samples · d floats.
        temperature: 1 / β.
        refresh_fraction: share of the cache that is encoded anew each step, oldest first.
        views_per_sample: with an id a view, views of a sample: ids ``sample · views_per_sample + view``.
        seed: of the draws, which are a function of (seed, number of the call).

    Notes:
        Without ``encode`` the drawn negatives are constants and only the batch's own embeddings refresh the cache.
    """

    def __init__(
        self,
        num_samples: int,
        dim: int,
        temperature: float = 0.07,
        *,
        refresh_fraction: float = 0.01,
        views_per_sample: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(num_samples, temperature)
        if not 0 <= refresh_fraction <= 1:
            raise ValueError(f"refresh_fraction must be in [0, 1], a share of the cache; got {refresh_fraction}")
        self.refresh_fraction = refresh_fraction
        self.views_per_sample = views_per_sample
        self.seed = seed
        self._embeddings = SampleTable(num_samples, (dim,), torch.float32, 0.0)
        self._written = SampleTable(num_samples, (), torch.int64, _NEVER)  # the call at which an entry was last encoded
        self._calls = 0

    @torch.no_grad()
    def _weigh(
        self, pairs: Pairs, logits: Tensor, log_mass: Tensor, positive: Tensor, encode: Encode | None
    ) -> Weights:
        if self.training:
            self._refresh(pairs, encode)
        elif bool((self._written.data == _NEVER).all()):
            raise ValueError("the cache is empty: train before you evaluate, or load a state")
        ids = pairs.row_ids
        views = self.views_per_sample if pairs.index is not None and pairs.index.ndim == 2 else 1
        entries = torch.arange(len(self._written.data), device=ids.device)
        scores = (pairs.rows @ self._embeddings.data.to(pairs.rows).T).div_(self.temperature)  # (rows, num_samples)
        scores.masked_fill_((self._written.data == _NEVER) | (entries // views == ids[:, None] // views), -torch.inf)
        w_pos = (positive - torch.logaddexp(positive, log_sum_exp(scores))).exp()

        noise = exponential_noise(pairs, scores.shape[1:], self.seed, self._calls).view_as(scores)
        drawn = (scores - noise.clamp_(min=2**-25).log_()).argmax(1)  # Gumbel; 0 would draw masked
        weight = (1 - w_pos)[:, None]
        if encode is None:
            carried = Carried(self._embeddings.read(drawn).to(pairs.rows.dtype)[:, None], weight)
        else:
            again, place = torch.unique(drawn, return_inverse=True)
            encoded = encode(again)
            if len(encoded) != len(again):
                raise ValueError(f"encode gave {len(encoded)} embeddings for {len(again)} ids: give one an id")
            carried = Carried(encoded[place][:, None], weight, encoded, place[:, None])
        self._calls += self.training
        self.last["cached_share"] = (self._written.data != _NEVER).float().mean()
        return Weights(torch.zeros_like(logits), w_pos, carried=carried)

    def _refresh(self, pairs: Pairs, encode: Encode | None) -> None:
        """Let the batch's embeddings in, then encode the oldest entries anew."""
        if pairs.index is not None and pairs.index.ndim == 1:
            self._write(pairs.index, pairs.columns[: pairs.size])
        else:
            self._write(pairs.column_ids, pairs.columns)
        count = math.ceil(self.refresh_fraction * len(self._written.data))
        if encode is not None and count:
            oldest = self._written.data.topk(count, largest=False).indices
            self._write(oldest, encode(oldest))

    def _write(self, ids: Tensor, embeddings: Tensor) -> None:
        self._embeddings.write(ids, embeddings)
        self._written.write(ids, torch.full_like(ids, self._calls))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the cache, its ages and the position in the noise."""
        tables = {"embeddings": self._embeddings.data, "written": self._written.data}
        return {**tables, "seed": self.seed, "calls": self._calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a saved cache: the next call draws what would have been drawn next."""
        self._embeddings.load(state["embeddings"])
        self._written.load(state["written"])
        self.seed, self._calls = state["seed"], state["calls"]
