"""EMC²: every sample's Markov chain draws its negatives from the softmax over the whole data set."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torch_emc2.chains import EMPTY, ChainTable
from torch_emc2.isir import resample
from torch_emc2.losses.base import Carried, CheckedEncode, Weights, require_int
from torch_emc2.losses.noise import exponential_noise, proposal_order
from torch_emc2.losses.stateful import StatefulLoss
from torch_emc2.metropolis import walk
from torch_emc2.pairs import Pairs
from torch_emc2.slots import Slots
from torch_emc2.tables import SampleTable

__all__ = ["Carry", "EMC2Loss", "Kernel"]

Carry = Literal["encode", "encode_if_used", "cache", "drop"]
Kernel = Literal["metropolis", "isir"]
_Encoded = tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]


class EMC2Loss(StatefulLoss):
    """Global contrastive loss by Markov chain Monte Carlo negative sampling (Yau et al., ICML 2024).

    The batch's negatives are proposals to a Metropolis–Hastings chain that each sample keeps between its visits and
    whose states are draws from the softmax over all negatives of the data set. Weights: the share of its steps after
    burn-in that the chain spends at each negative; what it spends at the negative it came in with is the carried
    negative's weight.

    Args:
        num_samples: size of the data set (of its views, with an id a view): ids are below it. None: ids are any int64
            but -1, and the tables grow with every new one.
        temperature: 1 / β.
        burn_in: share of a visit's steps that are not counted, in [0, 1).
        num_chains: chains a sample; they share the proposals, and their mean has less variance.
        carry: who supplies the carried negative's embedding.
            ``"encode"``: ``encode(ids)`` does, with today's weights and before the walk, so the entry score is fresh
            too.
            ``"encode_if_used"``: ``encode(ids)`` does, for chains that stayed at it after burn-in; the entry score is
            of the similarity stored at the last visit, renewed where the chain stays to the end.
            ``"cache"``: the loss keeps every sample's last embedding, 4·d bytes each; it gets no gradient itself.
            ``"drop"``: nobody; its term is left out and the estimate is biased.
        kernel: how a chain moves. ``"metropolis"`` is the paper's. ``"isir"`` chooses among the batch and the carried
            negative by their softmax, which are its weights too: no burn-in, less variance, and exact in the long run
            although batches are drawn without replacement. There ``encode(ids)`` may return (k, views, d), all views of
            the ids' samples, which are then carried together; with an id a view, ids must then be
            ``sample · views + view``.
        seed: of the chains' noise, which is a function of (seed, number of the call).

    Notes:
        With ``index`` (b,) both views of a sample share its chain: the second view's walk starts where the first one's
        ended, rescored. That is the paper's form, for views that are drawn anew each time. With ``index`` (b, 2) every
        view has its own chain, which is less biased where the views are fixed.

    Example::

        >>> loss_fn = EMC2Loss(num_samples=1000)
        >>> loss = loss_fn(torch.randn(8, 128), torch.randn(8, 128), torch.randperm(1000)[:8])
    """

    def __init__(
        self,
        num_samples: int | None,
        temperature: float = 0.07,
        *,
        burn_in: float = 0.5,
        num_chains: int = 1,
        carry: Carry = "cache",
        kernel: Kernel = "metropolis",
        seed: int = 0,
    ) -> None:
        super().__init__(num_samples, temperature)
        if not 0 <= burn_in < 1:
            raise ValueError(f"burn_in must be in [0, 1), the share of steps left out; got {burn_in}")
        if require_int("num_chains", num_chains) < 1:
            raise ValueError(f"num_chains must be at least 1, got {num_chains}")
        if carry not in get_args(Carry):
            raise ValueError(f"carry must be one of {', '.join(get_args(Carry))}; got {carry!r}")
        if kernel not in get_args(Kernel):
            raise ValueError(f"kernel must be one of {', '.join(get_args(Kernel))}; got {kernel!r}")
        self.burn_in = burn_in
        self.num_chains = num_chains
        self.carry = carry
        self.kernel = kernel
        self.seed = require_int("seed", seed)
        self._slots = Slots(self.num_samples)
        self.chains = ChainTable(self.num_samples, num_chains)
        self._embeddings: SampleTable | None = None  # carry="cache"; made when d is known

    def _alike(self) -> dict[str, object]:
        own = {name: getattr(self, name) for name in ("burn_in", "num_chains", "carry", "kernel", "seed")}
        return {**super()._alike(), **own}

    def _weigh(
        self, pairs: Pairs, logits: Tensor, log_mass: Tensor, positive: Tensor, encode: CheckedEncode | None
    ) -> Weights:
        if encode is None and self.carry in ("encode", "encode_if_used"):
            raise ValueError(
                f'carry="{self.carry}" needs encode: loss(z1, z2, index, encode=fn) with fn(ids) -> (k, d)'
            )
        slots = self._slots.find(pairs.column_ids)
        carried_by_all = self.chains.ids.read(slots).long()  # (columns, chains), as every rank sees it
        carried, slots = pairs.own_rows(carried_by_all), pairs.own_rows(slots)  # (rows, …)
        met, encoded, place = None, None, None
        if self.carry == "encode":
            anywhere = bool((carried_by_all != EMPTY).any())
            met, encoded, place = self._encode(pairs, carried, carried != EMPTY, anywhere, encode)
        elif self.carry == "cache":
            met = self._recall(carried, pairs)
        if met is None:  # the entry score (rows, chains · carried views) is that of the last visit …
            score = self.chains.similarities.read(slots).to(logits.dtype).div_(self.temperature)
        else:  # … or fresh
            score = self._log_scores(pairs, met)
            score.masked_fill_((carried == EMPTY).repeat_interleave(score.shape[1] // self.num_chains, 1), -torch.inf)

        move = self._walk if self.kernel == "metropolis" else self._resample
        in_batch, at_carried, end, end_score = move(pairs, logits, carried, score)

        if self.carry == "encode_if_used":
            used = at_carried > 0
            met, encoded, place = self._encode(pairs, carried, used, pairs.anywhere(bool(used.any())), encode)
            if met is not None:  # a score that stayed as it was could hold its chain for ever
                stayed = (end < 0) & used[-len(end) :]
                end_score = torch.where(stayed, self._log_scores(pairs, met)[-len(end) :], end_score)
        if self.training:
            self._remember(pairs, carried, end, end_score)
        self.last["carried_share"] = at_carried.sum() / carried.numel()
        if met is None:
            return Weights(in_batch)
        return Weights(in_batch, carried=Carried(met, at_carried.div_(self.num_chains), encoded, place))

    def _walk(
        self, pairs: Pairs, logits: Tensor, carried: Tensor, carried_score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Walk all chains over the batch: where views share a chain one view after the other, else all at once.

        Returns, with a row's steps after burn-in as the whole, the share of each column (rows, columns), mean over its
        chains, and the share of the carried negative (rows, chains); and for each chain (local or rows, chains) the
        column at which it ends, -1 for the carried negative, and its log score.
        """
        assert pairs.index is not None
        walks = 2 if pairs.index.ndim == 1 else 1
        burnt = int(self.burn_in * pairs.num_negatives)
        counted = _counted(pairs.start, pairs.local, pairs.size, burnt, logits.device)
        noise = exponential_noise(pairs, (self.num_chains, logits.shape[1]), self.seed, self._calls)
        x, entry, e, counts = (
            rows.view(walks, -1, *rows.shape[1:]) for rows in (logits, carried_score, noise.flatten(0, 1), counted)
        )
        done = walk(x, entry, e, counts, proposal_order(pairs, self.seed, self._calls))
        self.last["acceptance"] = done.accepted / (carried.numel() * pairs.num_negatives)
        num_counted = pairs.num_negatives - burnt
        return (
            done.steps.flatten(0, 1).div_(num_counted * self.num_chains),
            done.carried_steps.flatten(0, 1).div_(num_counted),
            done.state,
            done.score,
        )

    def _resample(
        self, pairs: Pairs, logits: Tensor, carried: Tensor, carried_score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose among the batch and the carried negative; takes and returns what `_walk` does."""
        assert pairs.index is not None
        walks = 2 if pairs.index.ndim == 1 else 1
        views = carried_score.view(len(carried), self.num_chains, -1)
        together = views.shape[2] if pairs.index.ndim == 2 else 1  # ids of views that are carried as one
        present = torch.isin(carried // together, pairs.column_ids // together)  # in the batch: not to be counted twice
        views = views.masked_fill(present[:, :, None], -torch.inf)
        score = views.logsumexp(2)
        # A sample's chains draw from different parts of (0, 1], in random order: each uniform, together well spread.
        noise = exponential_noise(pairs, (2, self.num_chains), self.seed, self._calls)
        uniform = (noise[:, :, 0].neg().exp_() + noise[:, :, 1].argsort(-1)) / self.num_chains
        by_walk = [tensor.view(walks, -1, tensor.shape[-1]) for tensor in (logits, score, uniform)]

        weights, carried_weights = [], []
        at = torch.full_like(by_walk[1][0], -1, dtype=torch.int64)
        for x, carried_x, u in zip(*by_walk, strict=True):
            done = resample(x, carried_x.masked_fill(at >= 0, -torch.inf), u)
            weights.append(done.weights)
            carried_weights.append(done.carried_weights)
            at = torch.where(done.state < 0, at, done.state)
        end_score = torch.where(at < 0, by_walk[1][-1], by_walk[0][-1].gather(1, at.clamp(min=0)))
        self.last["acceptance"] = 1 - torch.stack(carried_weights).mean()
        share_of_view = (views - score[:, :, None]).exp().nan_to_num(nan=0.0)  # none carried: -inf less -inf
        at_carried = (torch.cat(carried_weights)[:, :, None] * share_of_view).flatten(1)
        return torch.cat(weights), at_carried, at, end_score

    def _encode(
        self, pairs: Pairs, carried: Tensor, wanted: Tensor, anywhere: bool, encode: CheckedEncode | None
    ) -> _Encoded:
        """Encode each wanted id of (rows, chains) once: what each row meets, the vectors themselves, and the places.

        Shapes (rows, chains · views, d), (k · views, d) and (rows, chains · views), as in `Carried`; None where no id
        is wanted on any rank. Where one is `anywhere`, a rank that wants none has a stand-in that no chain is at.
        """
        if not anywhere:
            return None, None, None
        ids, place = torch.unique(carried[wanted], return_inverse=True)
        ids = pairs.some_ids(ids)
        with pairs.together():
            assert encode is not None
            encoded = encode(ids)
            views = len(encoded) // len(ids)
            if views != 1 and (self.kernel != "isir" or self.carry != "encode"):
                raise ValueError(
                    f'encode gave {views} views an id: only kernel="isir" with carry="encode" carries more than one; '
                    f"here they are {self.kernel!r} and {self.carry!r}"
                )
            if views != 1 and self.num_samples is None and pairs.index is not None and pairs.index.ndim == 2:
                raise ValueError(
                    f"encode gave {views} views an id: views are carried together where their ids are sample · {views} "
                    "+ view, so give num_samples"
                )
        first = torch.zeros_like(carried).masked_scatter_(wanted, place * views)
        place = (first[:, :, None] + torch.arange(views, device=first.device)).flatten(1)
        return encoded.index_select(0, place.flatten()).view(*place.shape, -1), encoded, place

    def _recall(self, carried: Tensor, pairs: Pairs) -> Tensor | None:
        """Look up the cached embeddings (rows, chains, d) of carried negatives; None before the first visit."""
        if self._embeddings is None:
            return None
        dim = self._embeddings.data.shape[1]
        if dim != pairs.rows.shape[1]:
            raise ValueError(
                f"z1 and z2 must be (b, {dim}) as the cached embeddings are, got d = {pairs.rows.shape[1]}"
            )
        slots = self._slots.find(carried.flatten()).clamp(min=0)  # what an empty chain meets has no weight
        met = self._embeddings.read(slots).to(pairs.rows.dtype)
        return met.view(*carried.shape, dim)

    def _log_scores(self, pairs: Pairs, met: Tensor) -> Tensor:
        """Score what each row meets: (rows, met a row)."""
        return torch.bmm(met, pairs.rows[:, :, None])[:, :, 0].div_(self.temperature)

    def _remember(self, pairs: Pairs, carried: Tensor, end: Tensor, end_score: Tensor) -> None:
        """Write back where the chains ended. Last of all, so that a call that fails changes nothing."""
        column_ids = pairs.column_ids
        end_ids = torch.where(end < 0, carried[: len(end)], column_ids.take(end.clamp(min=0)))
        chain_ids = column_ids[: len(end) * pairs.size // pairs.local]  # a shared chain goes by its first view
        slots = self._slots.place(chain_ids)
        if self.carry == "cache":
            if self._embeddings is None:
                self._embeddings = SampleTable(self.num_samples, (pairs.columns.shape[1],), torch.float32, 0.0)
            self._embeddings.make_room(slots)
        self.chains.make_room(slots)
        ends, similarities = pairs.gather_rows(end_ids), pairs.gather_rows(end_score * self.temperature)
        self._slots.keep(chain_ids, slots)
        self.chains.write(slots, ends, similarities)
        if self._embeddings is not None:
            self._embeddings.write(slots, pairs.columns[: len(slots)])
        self._calls += 1

    def _forget(self, ids: Tensor) -> None:
        slots = self._slots.forget(ids)
        self.chains.forget(ids, slots)
        if self._embeddings is not None:
            self._embeddings.erase(slots)

    def get_extra_state(self) -> dict[str, Any]:
        """Return chains, cached embeddings, keys where the tables grow, and the position in the noise."""
        keys, slots = self._slots.keys()
        embeddings = None if self._embeddings is None else self._embeddings.state(slots)
        tables = {"keys": keys, "chains": self.chains.state(slots), "embeddings": embeddings}
        return {**tables, "seed": self.seed, "calls": self._calls}

    def _load(self, state: dict[str, Any]) -> None:
        keys, chains, embeddings = state["keys"], state["chains"], state["embeddings"]
        self._slots.check(keys, chains["ids"], chains["similarities"])
        self.chains.check(chains)
        table = None
        if self.carry == "cache":
            table = self._loaded_embeddings(keys, chains["ids"], embeddings)
        self._embeddings = table
        self._slots.load(keys)
        self.chains.load(chains)
        self.seed, self._calls = state["seed"], state["calls"]

    def _loaded_embeddings(self, keys: Tensor | None, ids: Tensor, embeddings: Tensor | None) -> SampleTable | None:
        if embeddings is None:
            if bool((ids != EMPTY).any()):
                raise ValueError(
                    'the saved state has chains and no embeddings for carry="cache": '
                    "build the loss with the carry it was saved with"
                )
            return None
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
            raise ValueError("the saved embeddings are not (n, d): the state is damaged")
        table = self._embeddings
        if table is None or table.data.shape[1:] != embeddings.shape[1:]:
            table = SampleTable(self.num_samples, tuple(embeddings.shape[1:]), torch.float32, 0.0)
        table.check(embeddings)
        self._slots.check(keys, embeddings)
        table.load(embeddings)
        return table


@lru_cache(maxsize=8)
def _counted(start: int, local: int, size: int, first_counted: int, device: torch.device) -> Tensor:
    """(rows, columns) bool: the column is a negative, and not among the row's first ``first_counted`` ones."""
    column, sample = torch.arange(2 * size, device=device), torch.arange(start, start + local, device=device)[:, None]
    step = column - (column > sample).long() - (column > sample + size).long()  # the own sample's columns are no steps
    return ((step >= first_counted) & (column % size != sample)).repeat(2, 1)
