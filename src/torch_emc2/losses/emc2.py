"""EMC²: every sample's Markov chain draws its negatives from the softmax over the whole data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.geometry import Contrast
from torch_emc2.kernels import KERNELS, Kernel, Visit
from torch_emc2.losses.calling import CheckedEncode
from torch_emc2.losses.chain_memory import ChainMemory
from torch_emc2.losses.draws import BatchDraws
from torch_emc2.losses.met import encode_met
from torch_emc2.losses.settings import NumSamples, PositiveWeight, require_int
from torch_emc2.losses.stateful import StatefulLoss
from torch_emc2.losses.weighting import Scores, Weights
from torch_emc2.memory.chains import EMPTY, ChainTable
from torch_emc2.temperature import Temperature
from torch_emc2.validation import Towers

__all__ = ["Carry", "EMC2Loss"]

Carry = Literal["encode", "encode_if_used", "cache", "drop"]


class EMC2Loss(StatefulLoss):
    """Global contrastive loss by Markov chain Monte Carlo negative sampling (Yau et al., ICML 2024).

    The batch's negatives are proposals to a Markov chain that each sample keeps between its visits and whose states are
    draws from the softmax over all negatives of the data set. Weights: what the kernel estimates of that softmax at
    each negative; at the negative that the chain came in with it is the carried negative's weight.

    A batch holds as many sets of proposals as a sample has columns, each with one view of every sample. A visit moves
    the chain in each of them, from the negative it came in with; its weights are those of all, and it goes on from the
    end in one, by a fair coin.

    Args:
        num_samples: size of the data set (of its views, with an id a view): ids are below it. None: ids are any int64
            but -1, and the tables grow with every new one. With ``towers=2`` of both sides, or a pair.
        temperature: 1 / β, or a `Temperature`, which is learnt.
        kernel: how a chain moves, by name (`torch_emc2.kernels.KERNELS`) or with its settings. ``"metropolis"``, the
            paper's, is ``Metropolis(burn_in=0.5)``. ``"isir"`` chooses among the batch and the carried negative by
            their softmax, which are its weights too: no burn-in, less variance, and exact in the long run although
            batches are drawn without replacement.
        num_chains: chains a sample; they share the proposals, and their mean has less variance.
        carry: who supplies the carried negative's embedding.
            ``"encode"``: ``encode(ids)`` does, with today's weights and before the walk, so the entry score is fresh
            too.
            ``"encode_if_used"``: ``encode(ids)`` does, for chains whose carried negative has a weight; the entry score
            is of the similarity stored at the last visit, renewed where the chain stays to the end.
            ``"cache"``: the loss keeps every sample's last embedding, 4·d bytes each; it gets no gradient itself.
            ``"drop"``: nobody; its term is left out and the estimate is biased, that of β's gradient beyond use.
        seed: of the chains' noise, which is a function of (seed, number of the call).
        positive_weight: κ, or ``"global"``; see `ContrastiveLoss`. The positive is a state then, at which an empty
            chain sits.
        towers: 1 or 2; see `ContrastiveLoss`. Each direction has chains of its own, whose states are ids of the other
            side.
        directions: of two towers.

    Notes:
        With ``index`` (b,) both views of a sample share its chain, the paper's form, for views that are drawn anew each
        time: both views' walks start at the carried negative, and the end of one of them is kept. With ``index`` (b, 2)
        every view has its own chain, which is less biased where the views are fixed.

        The authors let the second view's walk start where the first one's ended, and each walk propose both views of
        every sample: the same batch once more to a state just drawn from it, which biases what is drawn
        (docs/method.md has the numbers).

        A sample that is in the batch twice has its chain moved once, by its first rows.

    Example::

        >>> loss_fn = EMC2Loss(num_samples=1000)
        >>> loss = loss_fn(torch.randn(8, 128), torch.randn(8, 128), torch.randperm(1000)[:8])
    """

    sides: tuple[ChainMemory, ...]

    def __init__(
        self,
        num_samples: NumSamples,
        temperature: float | Temperature = 0.07,
        *,
        kernel: str | Kernel = "metropolis",
        num_chains: int = 1,
        carry: Carry = "cache",
        seed: int = 0,
        positive_weight: PositiveWeight = 0.0,
        towers: Towers = 1,
        directions: Directions = "both",
    ) -> None:
        super().__init__(
            temperature, num_samples, positive_weight=positive_weight, towers=towers, directions=directions
        )
        if not isinstance(kernel, Kernel) and not (isinstance(kernel, str) and kernel in KERNELS):
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, or a Kernel; got {kernel!r}")
        if require_int("num_chains", num_chains) < 1:
            raise ValueError(f"num_chains must be at least 1, got {num_chains}")
        if carry not in get_args(Carry):
            raise ValueError(f"carry must be one of {', '.join(get_args(Carry))}; got {carry!r}")
        self.kernel = kernel if isinstance(kernel, Kernel) else KERNELS[kernel]()
        self.num_chains = int(num_chains)
        self.carry = carry
        self.seed = require_int("seed", seed)
        stored = {"scored": carry in ("encode_if_used", "drop"), "cached": carry == "cache"}
        self.sides = tuple(ChainMemory(size, self.num_chains, **stored) for size in self.sizes)

    @property
    def chains(self) -> ChainTable:
        """The chains of one tower."""
        (side,) = self.sides
        return side.chains

    def _alike(self) -> dict[str, object]:
        own = {name: getattr(self, name) for name in ("kernel", "num_chains", "carry", "seed")}
        return {**super()._alike(), **own}

    def _weigh(self, contrast: Contrast, scores: Scores, encode: CheckedEncode | None) -> Weights:
        if encode is None and self.carry in ("encode", "encode_if_used"):
            given = "encode=fn" if self.towers == 1 else "encode=(encode_x, encode_y)"
            raise ValueError(f'carry="{self.carry}" needs encode: loss(x, y, index, {given}) with fn(ids) -> (k, d)')
        side, draws = self.sides[contrast.anchors], BatchDraws(contrast, self.seed, self._calls)
        slots = side.slots.find(contrast.chain_ids)
        carried_by_all = side.chains.ids.read(slots).long()  # as every rank sees it
        carried = contrast.to_rows(carried_by_all)  # (rows, chains)
        carried = carried.masked_fill(contrast.known_own(carried), EMPTY)  # no negative any more
        empty = carried == EMPTY
        at_positive = scores.log_positive[:, None] - math.log(contrast.column_views)  # which is in each set
        met = None
        if self.carry == "encode":
            met = encode_met(contrast, carried, ~empty, bool((carried_by_all != EMPTY).any()), encode)
        elif self.carry == "cache":
            met = self.sides[contrast.candidates].recall(carried, contrast.rows)
        score = at_positive
        if met is not None:
            score = met.similarities(contrast.rows) / scores.temperature
        elif side.chains.similarities is not None:
            score = contrast.to_rows(side.chains.similarities.read(slots)).to(scores.logits.dtype) / scores.temperature
        score = torch.where(empty, at_positive, score)

        sets, coins = draws.proposal_sets(), draws.coins(self.num_chains)
        proposals = self._proposals(contrast, scores, at_positive)
        keep_in = coins[: contrast.row_views].flatten(0, 1)
        own_place = contrast.own_place(sets) if self.positive_weight else None
        visit = Visit(proposals[:, sets], score, keep_in, carried, *contrast.proposal_ids(sets), own_place)
        move = self.kernel.move(visit, draws)
        end = torch.where(move.state < 0, -1, sets[move.kept_in, move.state])  # the column, or -1 for the carried one
        score = torch.where(end < 0, score, scores.logits.gather(1, end.clamp(min=0)))

        weights = torch.zeros_like(proposals).index_add_(1, sets.flatten(), move.weights.flatten(1))
        at_carried, w_pos = move.carried_weights, None
        if self.positive_weight:
            w_pos = weights.gather(1, contrast.own_columns).sum(1) + (at_carried * empty).mean(1)
            weights.scatter_(1, contrast.own_columns, 0.0)
            at_carried = at_carried.masked_fill(empty, 0.0)
        if self.carry == "encode_if_used":
            used = at_carried > 0
            met = encode_met(contrast, carried, used, contrast.ranks.anywhere(bool(used.any())), encode)
            if met is not None:  # a score that stayed as it was could hold its chain for ever
                score = torch.where((end < 0) & used, met.similarities(contrast.rows) / scores.temperature, score)
        write = None
        if self.training:
            ends = torch.where(end < 0, carried, contrast.ids_at(end.clamp(min=0)))
            write = self._writing(contrast, ends, score * scores.temperature, coins[-1])
        last = {"acceptance": move.acceptance, "carried_share": at_carried.sum() / carried.numel()}
        term = None if met is None else met.weighed(at_carried / self.num_chains)
        return Weights(weights, w_pos, carried=term, write=write, last=last)

    def _proposals(self, contrast: Contrast, scores: Scores, at_positive: Tensor) -> Tensor:
        """Log scores of the columns as proposals: hard negatives and, in its own sample's place, the positive are in
        each set, of which the others are in one.
        """
        logits = scores.logits
        if contrast.num_hard and contrast.column_views > 1:
            logits = logits.clone()
            logits[:, contrast.column_views * contrast.ranks.size :] -= math.log(contrast.column_views)
        if self.positive_weight:
            logits = logits.scatter(1, contrast.own_columns, at_positive.expand(-1, contrast.column_views))
        return logits

    def _writing(self, contrast: Contrast, ends: Tensor, similarities: Tensor, coins: Tensor) -> Callable[[], None]:
        """Be ready to write where the chains ended, ids and similarities (rows, chains).

        Of a shared chain the end in the view that ``coins`` (local, chains) say is kept.
        """
        if contrast.shared_chains:
            ends, similarities = (
                rows.view(contrast.row_views, *coins.shape).gather(0, coins[None])[0] for rows in (ends, similarities)
            )
        side, ranks = self.sides[contrast.anchors], contrast.ranks
        kept = None if side.chains.similarities is None else ranks.gather_rows(similarities)
        writes = [side.moving(contrast.chain_ids, ranks.gather_rows(ends), kept, contrast.first_anchors)]
        if self.carry == "cache":
            writes.append(self.sides[contrast.candidates].caching(*contrast.items()))

        def write_all() -> None:
            for write in writes:
                write()

        return write_all

    def _check_sides(self, saved: Sequence[dict[str, Any]]) -> None:
        for anchors, candidates in zip(saved, reversed(saved), strict=True):
            has_chains = bool((anchors["chains"]["ids"] != EMPTY).any())
            if self.carry == "cache" and has_chains and candidates["embeddings"] is None:
                raise ValueError(
                    'the saved state has chains and no embeddings for carry="cache": '
                    "build the loss with the carry it was saved with"
                )

    def _position(self) -> dict[str, Any]:
        return {**super()._position(), "seed": self.seed}

    def _take_position(self, state: dict[str, Any]) -> None:
        super()._take_position(state)
        self.seed = state["seed"]
