"""Negative Cache: one negative per row, drawn from the softmax over cached embeddings of the whole data set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.geometry import Contrast
from torch_emc2.kernels.counted import compiled_kernels
from torch_emc2.losses.arguments import require_int
from torch_emc2.losses.draws import BatchDraws
from torch_emc2.losses.encode import CheckedEncode
from torch_emc2.losses.stateful import PerSampleLoss, SampleMemory
from torch_emc2.losses.weighting import Carried, Conclusion, Scores, Weighing, Weights
from torch_emc2.memory.tables import SampleTable
from torch_emc2.rows import Rows, parts
from torch_emc2.settings.losses import PositiveWeight
from torch_emc2.temperature import Temperature
from torch_emc2.validation import Towers

__all__ = ["NegativeCacheLoss"]

_NEVER = -1
_FORGOTTEN = -2  # not encoded until the sample is in a batch again: it may not exist any more


class NegativeCacheLoss(PerSampleLoss):
    """Cached negatives drawn by the Gumbel-max trick (Lindgren et al. 2021).

    The loss keeps one embedding per sample. In each step the batch's embeddings enter the cache, the oldest entries are
    encoded anew, and each row draws one negative from the softmax over all cached entries of other samples. The drawn
    negative has weight ``1 - w_pos``, where ``w_pos`` is the positive's share in the softmax over positive and cache.

    Args:
        num_samples: size of the data set (in views, with an id per view); with two towers one size for both sides or a
            pair.
        dim: dimension d of the embeddings; the cache is num_samples · d floats.
        temperature: 1 / β, or a `Temperature`, which is learnt.
        refresh_fraction: share of the cache that is encoded anew in each step, oldest first.
        views_per_sample: with an id per view, the number of views of a sample: ids are
            ``sample · views_per_sample + view``.
        seed: seed of the draws, which are a function of (seed, number of the call).
        positive_weight: κ; ``"global"`` counts the positive once among all cached entries. See `ContrastiveLoss`.
        towers: 1 or 2; see `ContrastiveLoss`.
        directions: with two towers; see `ContrastiveLoss`.

    Notes:
        Without ``encode`` the drawn negatives are constants, and only the batch's own embeddings refresh the cache.
        Hard negatives take part in the draw. Each has the weight of as many cached entries as there are for one of the
        batch's negatives.
    """

    sides: tuple[_Cache, ...]

    def __init__(
        self,
        num_samples: int | tuple[int, int],
        dim: int,
        temperature: float | Temperature = 0.07,
        *,
        refresh_fraction: float = 0.01,
        views_per_sample: int = 2,
        seed: int = 0,
        positive_weight: PositiveWeight = "global",
        towers: Towers = 1,
        directions: Directions = "both",
    ) -> None:
        for size in num_samples if isinstance(num_samples, tuple) else (num_samples,):
            require_int("num_samples", size)
        super().__init__(
            temperature, num_samples, positive_weight=positive_weight, towers=towers, directions=directions
        )
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
        self.dim = dim
        self.sides = tuple(_Cache(require_int("num_samples", size), dim) for size in self.sizes)

    def _alike(self, device: str) -> dict[str, object]:
        own = {name: getattr(self, name) for name in ("dim", "refresh_fraction", "views_per_sample", "seed")}
        return {**super()._alike(device), **own, "compiled moves": compiled_kernels(device) is not None}

    def _weighing(self, contrast: Contrast, temperature: float | Tensor, encode: CheckedEncode | None) -> Weighing:
        if contrast.rows.shape[1] != self.dim:
            raise ValueError(
                f"the cache holds embeddings of dim={self.dim}, the batch has {contrast.rows.shape[1]}: no state has "
                "changed; build the loss with the dim of the encoder's output"
            )
        own_ids = contrast.row_views > 1 and not contrast.shared_chains
        if own_ids and contrast.row_views > self.views_per_sample:
            raise ValueError(f"{contrast.row_views} views of a sample: build the loss with as many views_per_sample")
        return _DrawnFromCache(self, contrast, encode)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{super().extra_repr()}, dim={self.dim}, refresh_fraction={self.refresh_fraction:g}"

    def _position(self) -> dict[str, Any]:
        return {**super()._position(), "seed": self.seed}

    def _take_position(self, state: dict[str, Any]) -> None:
        super()._take_position(state)
        self.seed = state["seed"]


class _DrawnFromCache(Weighing):
    """All of a row's weight except the positive's is at one draw from the cache, as it will be after this batch.

    Args:
        loss: the loss whose cache it is.
        contrast: the direction.
        encode: the caller's ``encode``, checked; or None.
    """

    def __init__(self, loss: NegativeCacheLoss, contrast: Contrast, encode: CheckedEncode | None) -> None:
        super().__init__(contrast)
        self.loss, self.cache, self.encode = loss, loss.sides[contrast.candidates], encode
        self.draws = BatchDraws(contrast, loss.seed, loss._calls)
        self.width = len(self.cache.written.data)
        self.fresh, self.written = self._fresh()
        if bool((self.written < 0).all()):
            raise ValueError("the cache is empty: train before you evaluate, or load a state")
        lacking = any(bool(self._no_entries(rows).all(1).any()) for rows in parts(contrast, self.width))
        if contrast.ranks.anywhere(lacking):
            raise ValueError("the cache has no entry of another sample for some row: train on more samples first")

    def weigh(self, rows: Rows, scores: Scores) -> Weights:
        vectors, contrast = rows.vectors, self.contrast
        logits = vectors @ self.cache.embeddings.data.to(vectors).T  # (rows, num_samples)
        for ids, embeddings in self.fresh:
            logits.index_copy_(1, ids, vectors @ embeddings.to(vectors).T)
        logits.div_(scores.temperature).masked_fill_(self._no_entries(rows), -torch.inf)
        num_cached = (logits > -torch.inf).sum(1)
        # A row's n negatives in the batch stand for all cached entries; positive and hard negatives are scaled alike.
        log_scale = num_cached.to(logits.dtype).log() - rows.log_num_negatives
        num_columns = contrast.column_views * contrast.ranks.size
        everything = torch.cat([logits, scores.logits[:, num_columns:] + log_scale[:, None]], 1)
        globally = self.loss.positive_weight == "global"
        log_positive = scores.positive.log_mass if globally else scores.log_positive + log_scale
        w_pos = (log_positive - torch.logaddexp(log_positive, everything.logsumexp(1))).exp()

        noise = self.draws.of(rows.span).exponential(everything.shape[1])
        drawn = (everything - noise.clamp_(min=2**-25).log_()).argmax(1)  # Gumbel; noise 0 would draw a masked one
        cached = drawn < logits.shape[1]
        weight = (1 - w_pos)[:, None]
        negatives = torch.zeros_like(scores.logits)
        if not bool(cached.all()):  # some drew a hard negative
            column = torch.where(cached, 0, drawn - logits.shape[1] + num_columns)[:, None]
            negatives.scatter_(1, column, weight.masked_fill(cached[:, None], 0.0))
            weight = weight.masked_fill(~cached[:, None], 0.0)
            drawn = torch.where(cached, drawn, logits.argmax(1))
        return Weights(negatives, w_pos, kept=(drawn, weight))

    def conclude(self, kept: tuple[Tensor, ...]) -> Conclusion:
        drawn, weight = kept
        if self.encode is not None:
            again, place = torch.unique(drawn, return_inverse=True)
            with self.contrast.ranks.together():
                encoded = self.encode(again)
            carried = Carried(encoded.detach()[place][:, None], weight, encoded, place[:, None])
        else:
            carried = Carried(self.cache.read(drawn, self.fresh).to(weight)[:, None], weight)

        def write() -> None:
            for ids, embeddings in self.fresh:
                self.cache.write(ids, embeddings, self.loss._calls)

        write_if = write if self.loss.training else None
        return Conclusion(carried, None, write_if, {"cached_share": (self.written >= 0).float().mean()})

    def _no_entries(self, rows: Rows) -> Tensor:
        """(rows, num_samples) which entries are no negatives: empty, or of the row's sample, or known to be its own."""
        contrast = self.contrast
        assert contrast.candidate_ids is not None
        entries = torch.arange(len(self.written), device=contrast.rows.device)
        views = self.loss.views_per_sample if contrast.candidate_ids.ndim == 2 else 1
        none = (self.written < 0) | (entries // views == contrast.partner_ids[rows.span, None] // views)
        if rows.relations is not None:
            of_item = rows.relations.related.repeat(1, len(contrast.item_ids) // contrast.ranks.size)
            own = torch.zeros(none.shape, dtype=torch.int32, device=none.device)
            own.index_add_(1, contrast.item_ids, of_item.int())
            none = none | (own > 0)
        return none

    def _fresh(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Choose what to write: the batch's embeddings, then the oldest entries, encoded anew.

        Returns the ids and embeddings of each, in this order, and the call (num_samples,) at which each entry will have
        been written.
        """
        contrast, call = self.contrast, self.loss._calls
        written = self.cache.written.data.to(contrast.rows.device, copy=True)
        if not self.loss.training:
            return [], written
        dtype, ranks = self.cache.embeddings.data.dtype, contrast.ranks
        ids = contrast.item_ids
        embeddings = contrast.columns.detach()[: len(ids)].to(dtype)
        if (first := contrast.first_candidates) is not None:
            ids, embeddings = ids[first], embeddings[first]
        fresh = [(ids, embeddings)]
        written[ids] = call
        count = math.ceil(self.loss.refresh_fraction * len(written))
        if self.encode is not None and count:
            by_age = written * len(written) + torch.arange(len(written), device=written.device)  # no ties: ranks agree
            by_age.masked_fill_(written == _FORGOTTEN, torch.iinfo(by_age.dtype).max)
            oldest = by_age.topk(count, largest=False).indices
            oldest = oldest[written[oldest] != _FORGOTTEN]
            shares = oldest.tensor_split(ranks.world_size)  # each entry on one rank: with dropout, ranks would differ
            mine = shares[ranks.rank]
            embeddings = contrast.rows.new_empty(0, contrast.rows.shape[1])
            if len(oldest):
                with ranks.together():
                    embeddings = self.encode(contrast.some_ids(mine), gradient=False)[: len(mine)]
            fresh.append((oldest, ranks.gather(embeddings.to(dtype), tuple(len(share) for share in shares))))
            written[oldest] = call
        return fresh, written


class _Cache(SampleMemory):
    """Embeddings of one side, and the call at which each was last encoded."""

    def __init__(self, num_samples: int, dim: int) -> None:
        self.embeddings = SampleTable(num_samples, (dim,), torch.float32, 0.0)
        self.written = SampleTable(num_samples, (), torch.int64, _NEVER)

    def read(self, ids: Tensor, fresh: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Look up the embeddings of ``ids`` (k,) as they will be once the ``fresh`` ones are written."""
        found = self.embeddings.read(ids)
        for new_ids, embeddings in fresh:
            place = ids.new_full((len(self.written.data),), -1)
            place[new_ids] = torch.arange(len(new_ids), device=ids.device)
            at = place[ids]
            if len(new_ids):
                found = torch.where(at[:, None] >= 0, embeddings[at.clamp(min=0)], found)
        return found

    def write(self, ids: Tensor, embeddings: Tensor, call: int) -> None:
        """Set entries of ``ids`` (k,)."""
        self.embeddings.write(ids, embeddings)
        self.written.write(ids, torch.full_like(ids, call))

    def state(self) -> dict[str, Any]:
        return {"embeddings": self.embeddings.data, "written": self.written.data}

    def check(self, state: dict[str, Any]) -> None:
        self.embeddings.check(state["embeddings"])
        self.written.check(state["written"])

    def load(self, state: dict[str, Any]) -> None:
        self.embeddings.load(state["embeddings"])
        self.written.load(state["written"])

    def forget(self, ids: Tensor) -> None:
        self.embeddings.erase(ids)
        at = ids.to(self.written.data.device)
        self.written.write(at, torch.full_like(at, _FORGOTTEN))
