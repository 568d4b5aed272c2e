"""EMC²: every sample's Markov chain draws its negatives from the softmax over the whole data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor

from torch_emc2.batch import Directions
from torch_emc2.geometry import Contrast
from torch_emc2.kernels import KERNELS, Kernel
from torch_emc2.kernels.counted import compiled_kernels
from torch_emc2.losses.arguments import NumSamples, require_int
from torch_emc2.losses.chain_memory import ChainMemory
from torch_emc2.losses.draws import BatchDraws
from torch_emc2.losses.encode import CheckedEncode
from torch_emc2.losses.stateful import PerSampleLoss
from torch_emc2.losses.visiting import ChainSettings, Visiting
from torch_emc2.losses.weighting import Weighing
from torch_emc2.memory.chains import EMPTY, ChainTable
from torch_emc2.seeds import mix_seed
from torch_emc2.settings.losses import Carry, PositiveWeight
from torch_emc2.temperature import Temperature
from torch_emc2.validation import Towers

__all__ = ["EMC2Loss"]


class EMC2Loss(PerSampleLoss):
    """Global contrastive loss by Markov chain Monte Carlo negative sampling (Yau et al., ICML 2024).

    Each sample keeps a Markov chain between its visits, whose states are draws from the softmax over all negatives of
    the data set. In a visit the batch's negatives are proposals to the chain. The kernel's estimate of that softmax
    gives each of the batch's negatives its weight; the rest belongs to the carried negative, where the chain was when
    the visit began.

    A batch is split into as many sets of proposals as a sample has views, each with one view of every sample. A visit
    moves the chain through each set separately, always from the carried negative. The weights are the mean over sets;
    the final state in one set, drawn uniformly, is kept.

    Args:
        num_samples: size of the data set (in views, with an id per view): ids are below it. None: ids are any int64
            except -1, and the tables grow with every new one. With ``towers=2`` one size for both sides or a pair.
        temperature: 1 / β, or a `Temperature`, which is learnt.
        kernel: how a chain moves, by name (`torch_emc2.kernels.KERNELS`) or as a `Kernel` with its settings. ``"isir"``
            chooses among the batch and the carried negative by their softmax, which also gives the weights: it has no
            burn-in, and is exact in the long run although batches are drawn without replacement. ``"metropolis"``, the
            paper's, is ``Metropolis(burn_in=0.5)``, and has more variance.
        num_chains: chains per sample; they share the proposals, and their mean has less variance.
        carry: where the carried negative's embedding comes from.
            ``"encode"``: from ``encode(ids)``, with the encoder's current weights and before the walk, so the score
            that the chain enters with is current too.
            ``"encode_if_used"``: from ``encode(ids)``, for chains whose carried negative has a weight; the entry score
            is computed from the similarity stored at the last visit, which is renewed where the chain stays to the end.
            ``"cache"``: the loss keeps every sample's last embedding, 4·d bytes each; the carried negative gets no
            gradient.
            ``"defer"``: as ``"cache"``, but the gradient that a carried negative is due is kept, for 4·d more bytes per
            sample, and given to it one visit late, when it is in a batch itself. In the mean over epochs this is the
            same.
            ``"drop"``: nowhere; its term is left out. The estimate is biased, and that of β's gradient is unusable.
        num_remembered: number of further proposals for all rows, from the second visit on: samples drawn uniformly from
            the data set, with the embeddings of their last visits, which the loss then keeps whatever ``carry`` is, 4·d
            bytes per sample. Nothing is encoded for them, and they get no gradient; the loss's value is the batch's
            estimate without them. Not with ``labels``, which are not known for them.
        seed: seed of the chains' noise and of the remembered samples, which are a function of
            (seed, number of the call).
        positive_weight: κ, or ``"global"``; see `ContrastiveLoss`. Unless it is 0, the positive is a state too, at
            which an empty chain sits.
        towers: 1 or 2; see `ContrastiveLoss`. Each direction has its own chains, whose states are ids of the other
            side.
        directions: with two towers; see `ContrastiveLoss`.

    Notes:
        With ``index`` (b,) both views of a sample share its chain, as in the paper, for views that are drawn anew each
        time: both views' walks start at the carried negative, and the final state of one of them is kept. With
        ``index`` (b, 2) every view has its own chain, which is less biased where the views are fixed.

        In the authors' version the second view's walk starts where the first one's ended, and each walk proposes both
        views of every sample. The same batch is then proposed again to a state just drawn from it, which biases the
        draws (docs/method.md has the numbers).

        If a sample is in the batch twice, its chain moves once, by the sample's first rows.

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
        kernel: str | Kernel = "isir",
        num_chains: int = 1,
        carry: Carry = "cache",
        num_remembered: int = 0,
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
        if require_int("num_remembered", num_remembered) < 0:
            raise ValueError(f"num_remembered must be at least 0, got {num_remembered}")
        self.kernel = kernel if isinstance(kernel, Kernel) else KERNELS[kernel]()
        self.num_chains = int(num_chains)
        self.carry = carry
        self.num_remembered = int(num_remembered)
        self.seed = require_int("seed", seed)
        stored = {
            "scored": carry in ("encode_if_used", "drop"),
            "cached": carry in ("cache", "defer") or self.num_remembered > 0,
            "deferred": carry == "defer",
        }
        self.sides = tuple(
            ChainMemory(size, self.num_chains, num_negatives=others, **stored)
            for size, others in zip(self.sizes, reversed(self.sizes), strict=True)
        )

    @property
    def chains(self) -> ChainTable:
        """The chains with one tower; with two see ``sides[0].chains`` and ``sides[1].chains``."""
        if self.towers == 2:
            raise ValueError("with towers=2 each side has chains of its own: sides[0].chains, sides[1].chains")
        return self.sides[0].chains

    def extra_repr(self) -> str:
        """Show the settings."""
        own = f"kernel={self.kernel}, num_chains={self.num_chains}, carry={self.carry!r}"
        return f"{super().extra_repr()}, {own}, num_remembered={self.num_remembered}"

    def _alike(self, device: str) -> dict[str, object]:
        own = {name: getattr(self, name) for name in ("kernel", "num_chains", "carry", "num_remembered", "seed")}
        return {**super()._alike(device), **own, "compiled moves": compiled_kernels(device) is not None}

    def _widen(self, contrast: Contrast) -> Contrast:
        if not self.num_remembered:
            return contrast
        if contrast.known is not None and contrast.known.labels is not None:
            raise ValueError("labels are not known of what is remembered: build the loss with num_remembered=0")
        candidates, key = self.sides[contrast.candidates], mix_seed(self.seed, contrast.anchors, self._calls)
        batch, like = contrast.item_ids, contrast.row_vectors
        return contrast.with_remembered(*candidates.remembered(self.num_remembered, key, batch, like))

    def _weighing(self, contrast: Contrast, temperature: float | Tensor, encode: CheckedEncode | None) -> Weighing:
        if encode is None and self.carry in ("encode", "encode_if_used"):
            given = "encode=fn" if self.towers == 1 else "encode=(encode_x, encode_y)"
            raise ValueError(f'carry="{self.carry}" needs encode: loss(x, y, index, {given}) with fn(ids) -> (k, d)')
        settings = ChainSettings(self.kernel, self.num_chains, self.carry, self.positive_weight != 0, self.training)
        anchors, candidates = self.sides[contrast.anchors], self.sides[contrast.candidates]
        draws = BatchDraws(contrast, self.seed, self._calls)
        return Visiting(contrast, anchors, candidates, settings, draws, temperature, encode)

    def _check_sides(self, saved: Sequence[dict[str, Any]]) -> None:
        for anchors, candidates in zip(saved, reversed(saved), strict=True):
            has_chains = bool((anchors["chains"]["ids"] != EMPTY).any())
            if self.carry in ("cache", "defer") and has_chains and candidates["embeddings"] is None:
                raise ValueError(
                    f'the saved state has chains and no embeddings for carry="{self.carry}": '
                    "build the loss with the carry it was saved with"
                )

    def _position(self) -> dict[str, Any]:
        return {**super()._position(), "seed": self.seed}

    def _take_position(self, state: dict[str, Any]) -> None:
        super()._take_position(state)
        self.seed = state["seed"]
