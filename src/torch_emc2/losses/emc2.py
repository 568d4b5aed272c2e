"""EMC²: every sample's Markov chain draws its negatives from the softmax over the whole data set."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torch_emc2.chains import EMPTY, ChainTable
from torch_emc2.isir import resample
from torch_emc2.losses.base import Carried, CheckedEncode, Weights, require_int
from torch_emc2.losses.noise import exponential_noise, fair_coins, proposal_sets
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

    A batch holds two sets of proposals, each with one view of every sample. A visit walks over each of them, from the
    negative it came in with; its weights are the mean of both, and it goes on from the end of one, by a fair coin.

    Args:
        num_samples: size of the data set (of its views, with an id a view): ids are below it. None: ids are any int64
            but -1, and the tables grow with every new one.
        temperature: 1 / β.
        burn_in: share of a walk's b - 1 steps that are not counted, in [0, 1); of ``kernel="metropolis"``, there by
            default one half.
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
            although batches are drawn without replacement.
        seed: of the chains' noise, which is a function of (seed, number of the call).

    Notes:
        With ``index`` (b,) both views of a sample share its chain, the paper's form, for views that are drawn anew each
        time: both views' walks start at the carried negative, and the end of one of them is kept. With ``index`` (b, 2)
        every view has its own chain, which is less biased where the views are fixed.

        The authors let the second view's walk start where the first one's ended, and each walk propose both views of
        every sample: the same batch once more to a state just drawn from it, which biases what is drawn
        (docs/method.md has the numbers).

    Example::

        >>> loss_fn = EMC2Loss(num_samples=1000)
        >>> loss = loss_fn(torch.randn(8, 128), torch.randn(8, 128), torch.randperm(1000)[:8])
    """

    def __init__(
        self,
        num_samples: int | None,
        temperature: float = 0.07,
        *,
        burn_in: float | None = None,
        num_chains: int = 1,
        carry: Carry = "cache",
        kernel: Kernel = "metropolis",
        seed: int = 0,
    ) -> None:
        super().__init__(num_samples, temperature)
        if burn_in is not None and not 0 <= burn_in < 1:
            raise ValueError(f"burn_in must be in [0, 1), the share of steps left out; got {burn_in}")
        if burn_in is not None and kernel == "isir":
            raise ValueError(f'kernel="isir" has no burn-in, got burn_in={burn_in}: leave it out')
        num_chains = require_int("num_chains", num_chains)
        if num_chains < 1:
            raise ValueError(f"num_chains must be at least 1, got {num_chains}")
        if carry not in get_args(Carry):
            raise ValueError(f"carry must be one of {', '.join(get_args(Carry))}; got {carry!r}")
        if kernel not in get_args(Kernel):
            raise ValueError(f"kernel must be one of {', '.join(get_args(Kernel))}; got {kernel!r}")
        self.burn_in = 0.5 if burn_in is None else burn_in
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
        if met is None:  # the entry score (rows, chains) is that of the last visit …
            score = self.chains.similarities.read(slots).to(logits.dtype).div_(self.temperature)
        else:  # … or fresh
            score = self._log_scores(pairs, met).masked_fill_(carried == EMPTY, -torch.inf)

        sets = proposal_sets(pairs, self.seed, self._calls)  # of columns: each holds a view of every sample
        coins = fair_coins(pairs, self.num_chains, self.seed, self._calls)
        move = self._walk if self.kernel == "metropolis" else self._resample
        in_sets, at_carried, end = move(pairs, logits[:, sets], carried, score, sets, coins[:2].flatten(0, 1))
        in_batch = torch.empty_like(logits).index_copy_(1, sets.flatten(), in_sets.flatten(1))
        end_score = torch.where(end < 0, score, logits.gather(1, end.clamp(min=0)))

        if self.carry == "encode_if_used":
            used = at_carried > 0
            met, encoded, place = self._encode(pairs, carried, used, pairs.anywhere(bool(used.any())), encode)
            if met is not None:  # a score that stayed as it was could hold its chain for ever
                end_score = torch.where((end < 0) & used, self._log_scores(pairs, met), end_score)
        if self.training:
            self._remember(pairs, carried, end, end_score, coins[2] == 1)
        self.last["carried_share"] = at_carried.sum() / carried.numel()
        if met is None:
            return Weights(in_batch)
        return Weights(in_batch, carried=Carried(met, at_carried.div_(self.num_chains), encoded, place))

    def _walk(
        self, pairs: Pairs, logits: Tensor, carried: Tensor, carried_score: Tensor, sets: Tensor, in_set: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Walk all chains of every row over each of two sets of proposals, from where they came in.

        Args:
            pairs: the batch.
            logits: (rows, 2, size) of the proposals, in the order of the steps.
            carried: (rows, chains) ids of the carried negatives.
            carried_score: (rows, chains) their log scores.
            sets: (2, size) the proposals' columns.
            in_set: (rows, chains) the set in which each chain's end is kept.

        Returns:
            With a row's steps after burn-in as the whole the share of each proposal (rows, 2, size), mean over its
            chains, and of the carried negative (rows, chains); and the column at which each chain ends (rows, chains),
            -1 for the carried negative.
        """
        num_steps = pairs.size - 1
        burnt = int(self.burn_in * num_steps)
        step = torch.arange(pairs.size, device=logits.device)
        own = pairs.mine(sets[0].remainder(pairs.size).argsort())[:, None]  # where a row's own sample comes, as no step
        counted = (step >= burnt + (own <= burnt).long()) & (step != own)
        noise = exponential_noise(pairs, (2, self.num_chains, pairs.size), self.seed, self._calls)
        done = walk(
            logits.flatten(0, 1),
            carried_score.repeat_interleave(2, 0),
            noise.flatten(0, 2),
            counted[:, None].expand(2, -1, 2, -1).flatten(0, 2),
        )
        self.last["acceptance"] = done.accepted / (2 * num_steps * carried.numel())
        state, carried_steps = (tensor.view(-1, 2, self.num_chains) for tensor in (done.state, done.carried_steps))
        state = state.gather(1, in_set[:, None])[:, 0]
        return (
            done.steps.view_as(logits).div_(2 * self.num_chains * (num_steps - burnt)),
            carried_steps.sum(1).div_(2 * (num_steps - burnt)),
            torch.where(state < 0, -1, sets[in_set, state]),
        )

    def _resample(
        self, pairs: Pairs, logits: Tensor, carried: Tensor, carried_score: Tensor, sets: Tensor, in_set: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose among a set of proposals and the carried negative; takes and returns what `_walk` does.

        Where the carried negative is one view of a sample in the batch, the set that holds the other is left out.
        """
        inside = torch.stack([torch.isin(carried, pairs.column_ids[columns]) for columns in sets], 1)
        candidates = inside | ~inside.any(1, keepdim=True)  # (rows, 2, chains)
        share = candidates.to(logits.dtype) / candidates.sum(1, keepdim=True)
        in_set = torch.where(candidates.all(1), in_set, candidates[:, 1].long())
        # A sample's chains draw from different parts of (0, 1], in random order: each uniform, together well spread.
        noise = exponential_noise(pairs, (2, self.num_chains), self.seed, self._calls).flatten(0, 1)
        uniform = (noise[:, 0].neg().exp_() + noise[:, 1].argsort(-1)) / self.num_chains
        done = resample(
            logits,
            torch.where(inside, -torch.inf, carried_score[:, None]),
            share,
            in_set,
            uniform,
        )
        self.last["acceptance"] = 1 - done.carried_weights.mean()
        return done.weights, done.carried_weights, torch.where(done.state < 0, -1, sets[in_set, done.state])

    def _encode(
        self, pairs: Pairs, carried: Tensor, wanted: Tensor, anywhere: bool, encode: CheckedEncode | None
    ) -> _Encoded:
        """Encode each wanted id of (rows, chains) once: what each row meets, the vectors themselves, and the places.

        Shapes (rows, chains, d), (k, d) and (rows, chains), as in `Carried`; None where no id is wanted on any rank.
        Where one is `anywhere`, a rank that wants none has a stand-in that no chain is at.
        """
        if not anywhere:
            return None, None, None
        ids, place_of_wanted = torch.unique(carried[wanted], return_inverse=True)
        ids = pairs.some_ids(ids)
        with pairs.together():
            assert encode is not None
            encoded = encode(ids)
        place = torch.zeros_like(carried).masked_scatter_(wanted, place_of_wanted)
        return encoded[place], encoded, place

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

    def _remember(self, pairs: Pairs, carried: Tensor, end: Tensor, end_score: Tensor, second: Tensor) -> None:
        """Write back where the chains ended. Last of all, so that a call that fails changes nothing.

        Of a shared chain the end in its second view's walk is kept where ``second`` (local, chains) says so.
        """
        assert pairs.index is not None
        end_ids = torch.where(end < 0, carried, pairs.column_ids.take(end.clamp(min=0)))
        chain_ids = pairs.column_ids
        if pairs.index.ndim == 1:
            end_ids, end_score = (torch.where(second, *rows.chunk(2)[::-1]) for rows in (end_ids, end_score))  # type: ignore[assignment]
            chain_ids = pairs.index
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
