"""Negative Cache: one negative a row, drawn from the softmax over cached embeddings of the whole data set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_emc2.losses.base import Carried, CheckedEncode, Weights, log_sum_exp, require_int
from torch_emc2.losses.noise import exponential_noise
from torch_emc2.losses.stateful import StatefulLoss
from torch_emc2.pairs import Pairs
from torch_emc2.tables import SampleTable

__all__ = ["NegativeCacheLoss"]

_NEVER = -1
_FORGOTTEN = -2  # until the sample is in a batch: there may be nothing left to encode


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
        super().__init__(require_int("num_samples", num_samples), temperature)
        if not 0 <= refresh_fraction <= 1:
            raise ValueError(f"refresh_fraction must be in [0, 1], a share of the cache; got {refresh_fraction}")
        if require_int("dim", dim) < 1:
            raise ValueError(f"dim must be at least 1, the dimension of the embeddings; got {dim}")
        views_per_sample = require_int("views_per_sample", views_per_sample)
        if views_per_sample < 1:
            raise ValueError(f"views_per_sample must be at least 1, got {views_per_sample}")
        self.refresh_fraction = float(refresh_fraction)
        self.views_per_sample = views_per_sample
        self.seed = require_int("seed", seed)
        self._embeddings = SampleTable(num_samples, (dim,), torch.float32, 0.0)
        self._written = SampleTable(num_samples, (), torch.int64, _NEVER)  # the call at which an entry was last encoded

    def _alike(self) -> dict[str, object]:
        own = {name: getattr(self, name) for name in ("refresh_fraction", "views_per_sample", "seed")}
        return {**super()._alike(), "dim": self._embeddings.data.shape[1], **own}

    def _weigh(
        self, pairs: Pairs, logits: Tensor, log_mass: Tensor, positive: Tensor, encode: CheckedEncode | None
    ) -> Weights:
        dim = self._embeddings.data.shape[1]
        if pairs.rows.shape[1] != dim:
            raise ValueError(
                f"the cache holds embeddings of dim={dim}, the batch has {pairs.rows.shape[1]}: no state has changed; "
                "build the loss with the dim of the encoder's output"
            )
        fresh, written = self._fresh(pairs, encode)
        if bool((written < 0).all()):
            raise ValueError("the cache is empty: train before you evaluate, or load a state")
        scores = pairs.rows @ self._embeddings.data.to(pairs.rows).T  # (rows, num_samples)
        for ids, embeddings in fresh:
            scores.index_copy_(1, ids, pairs.rows @ embeddings.to(pairs.rows).T)
        scores.div_(self.temperature)
        row_ids = pairs.row_ids[:, None]
        views = self.views_per_sample if pairs.index is not None and pairs.index.ndim == 2 else 1
        entries = torch.arange(len(written), device=written.device)
        scores.masked_fill_((written < 0) | (entries // views == row_ids // views), -torch.inf)
        if bool((scores.amax(1) == -torch.inf).any()):
            raise ValueError("the cache has no entry of another sample for some row: train on more samples first")
        w_pos = (positive - torch.logaddexp(positive, log_sum_exp(scores))).exp()

        noise = exponential_noise(pairs, scores.shape[1:], self.seed, self._calls).view_as(scores)
        drawn = (scores - noise.clamp_(min=2**-25).log_()).argmax(1)  # Gumbel; 0 would draw masked
        weight = (1 - w_pos)[:, None]
        if encode is not None:
            again, place = torch.unique(drawn, return_inverse=True)
            with pairs.together():
                encoded = encode(again)
            carried = Carried(encoded[place][:, None], weight, encoded, place[:, None])
        for ids, embeddings in fresh:  # last of all, so that a call that fails changes nothing
            self._embeddings.write(ids, embeddings)
            self._written.write(ids, torch.full_like(ids, self._calls))
        if encode is None:
            carried = Carried(self._embeddings.read(drawn).to(pairs.rows.dtype)[:, None], weight)
        self._calls += self.training
        self.last["cached_share"] = (written >= 0).float().mean()
        return Weights(torch.zeros_like(logits), w_pos, carried=carried)

    def _fresh(self, pairs: Pairs, encode: CheckedEncode | None) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Choose what to write: the batch's embeddings, then the oldest entries' encoded anew, in this order.

        Returns ids and embeddings of each, and the call (num_samples,) at which each entry will have been written.
        """
        written = self._written.data.to(pairs.rows.device, copy=True)
        if not self.training:
            return [], written
        dtype = self._embeddings.data.dtype
        ids = pairs.index if pairs.index is not None and pairs.index.ndim == 1 else pairs.column_ids
        fresh = [(ids, pairs.columns[: len(ids)].to(dtype))]
        written[ids] = self._calls
        count = math.ceil(self.refresh_fraction * len(written))
        if encode is not None and count:
            by_age = written * len(written) + torch.arange(len(written), device=written.device)  # no ties: ranks agree
            by_age.masked_fill_(written == _FORGOTTEN, torch.iinfo(by_age.dtype).max)
            oldest = by_age.topk(count, largest=False).indices
            oldest = oldest[written[oldest] != _FORGOTTEN]
            parts = oldest.tensor_split(pairs.world_size)  # each is encoded once: there may be dropout
            mine = parts[pairs.rank]
            embeddings = pairs.rows.new_empty(0, pairs.rows.shape[1])
            if len(oldest):
                with pairs.together():
                    embeddings = encode(pairs.some_ids(mine), gradient=False)[: len(mine)]
            fresh.append((oldest, pairs.gather(embeddings.to(dtype), tuple(len(part) for part in parts))))
            written[oldest] = self._calls
        return fresh, written

    def _forget(self, ids: Tensor) -> None:
        self._embeddings.erase(ids)
        at = ids.to(self._written.data.device)
        self._written.write(at, torch.full_like(at, _FORGOTTEN))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the cache, its ages and the position in the noise."""
        tables = {"embeddings": self._embeddings.data, "written": self._written.data}
        return {**tables, "seed": self.seed, "calls": self._calls}

    def _load(self, state: dict[str, Any]) -> None:
        self._embeddings.check(state["embeddings"])
        self._written.check(state["written"])
        self._embeddings.load(state["embeddings"])
        self._written.load(state["written"])
        self.seed, self._calls = state["seed"], state["calls"]
