"""The table of estimators, from which the command, settings, diagnoses, figures, benchmarks and tests read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch_emc2.kernels import KERNELS, Kernel, Metropolis
from torch_emc2.losses.base import ContrastiveLoss
from torch_emc2.losses.emc2 import EMC2Loss
from torch_emc2.losses.in_batch import DCLLoss, InfoNCELoss
from torch_emc2.losses.momentum import MomentumLoss
from torch_emc2.losses.negative_cache import NegativeCacheLoss
from torch_emc2.losses.outside import load_outside, make_outside
from torch_emc2.losses.sogclr import SogCLRLoss
from torch_emc2.losses.uniformity import UniformityLoss
from torch_emc2.settings.losses import (
    LOSSES,
    EMC2Config,
    MomentumConfig,
    NegativeCacheConfig,
    PositiveWeight,
    SogCLRConfig,
    UniformityConfig,
    group_of,
    is_outside,
    require_loss,
)

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "LossContext",
    "Method",
    "find",
    "variants",
]


class LossContext(NamedTuple):
    """What a loss of any estimator is built for.

    Attributes:
        num_samples: ids are below it; None for no limit, for losses that allow it.
        temperature: 1 / β.
        dim: dimension of the embeddings.
        views_per_sample: ids per sample.
        seed: seed of the loss's draws.
        positive_weight: κ; None for the estimator's default.
    """

    num_samples: int | None
    temperature: float
    dim: int
    views_per_sample: int = 1
    seed: int = 0
    positive_weight: PositiveWeight | None = None

    @property
    def weight(self) -> dict[str, Any]:
        """``positive_weight`` as a keyword, where it is given."""
        return {} if self.positive_weight is None else {"positive_weight": self.positive_weight}


class Method(NamedTuple):
    """A line of the experiments' figures and tables.

    Attributes:
        title: its name there.
        colour: of the line.
        marker: on the line.
        fields: the settings that make it, where an estimator has several.
    """

    title: str
    colour: str
    marker: str
    fields: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Estimator:
    """One estimator, a row of the table.

    Attributes:
        name: as ``--loss`` takes it.
        loss: its class.
        build: builds the loss from the estimator's settings and a `LossContext`.
        methods: its lines in the experiments; the first one's title is the estimator's.
        variants: the settings with which its gradient is measured and the tests try it, by a label that follows the
            title; only settings that differ from the defaults.
    """

    name: str
    loss: type[ContrastiveLoss]
    build: Callable[[Any, LossContext], ContrastiveLoss]
    methods: tuple[Method, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})

    @property
    def settings(self) -> type[Any] | None:
        """The dataclass of the settings that a user can choose; None if there are none."""
        return LOSSES.get(self.name)

    @property
    def group(self) -> str:
        """The name of its settings in a config."""
        return group_of(self.name)

    def maker(
        self, fields: Mapping[str, Any], given: LossContext, settings: Any = None
    ) -> Callable[[int], ContrastiveLoss]:
        """Return a function that builds the loss from a seed, with ``settings`` (or defaults) except for ``fields``."""
        own = None if self.settings is None else replace(settings or self.settings(), **fields)
        return lambda seed: self.build(own, given._replace(seed=seed))


def _in_batch(given: LossContext) -> dict[str, Any]:
    """Return keywords for losses without a memory of samples.

    They get the size of the data only where n / N needs it, because it would also limit their ids.
    """
    size = {"num_samples": given.num_samples} if given.positive_weight == "global" else {}
    return {**given.weight, **size}


def variants(given: LossContext, settings: Mapping[str, Any] = {}) -> dict[str, Callable[[int], ContrastiveLoss]]:
    """Return, by title, a function for each variant of each estimator that builds its loss from a seed.

    Args:
        given: what the losses are built for.
        settings: settings by group, for estimators that do not start from their defaults.
    """
    return {
        f"{row.methods[0].title}, {label}".removesuffix(", "): row.maker(fields, given, settings.get(row.group))
        for row in ESTIMATORS.values()
        for label, fields in row.variants.items()
    }


def _kernel(own: EMC2Config) -> Kernel:
    if own.kernel == "isir" and own.burn_in is not None:
        raise ValueError(f"the kernel isir has no burn_in, got {own.burn_in}")
    return KERNELS[own.kernel]() if own.burn_in is None else Metropolis(own.burn_in)


def _emc2(own: EMC2Config, given: LossContext) -> EMC2Loss:
    return EMC2Loss(
        given.num_samples,
        given.temperature,
        kernel=_kernel(own),
        num_chains=own.num_chains,
        num_remembered=own.num_remembered,
        carry=own.carry,
        seed=given.seed,
        **given.weight,
    )


_METROPOLIS: dict[str, Any] = {"kernel": "metropolis", "carry": "encode", "num_chains": 1}
_ISIR: dict[str, Any] = {**_METROPOLIS, "kernel": "isir", "burn_in": None}


def _momentum(own: MomentumConfig, given: LossContext) -> MomentumLoss:
    return MomentumLoss(given.temperature, queue_size=own.queue_size, num_samples=given.num_samples, **given.weight)


def _uniformity(own: UniformityConfig, given: LossContext) -> UniformityLoss:
    return UniformityLoss(given.temperature, gamma=own.gamma, **_in_batch(given))


def _sogclr(own: SogCLRConfig, given: LossContext) -> SogCLRLoss:
    return SogCLRLoss(given.num_samples, given.temperature, own.gamma, **given.weight)


def _negative_cache(own: NegativeCacheConfig, given: LossContext) -> NegativeCacheLoss:
    return NegativeCacheLoss(
        given.num_samples,  # type: ignore[arg-type]  # which refuses None
        given.dim,
        given.temperature,
        refresh_fraction=own.refresh_fraction,
        views_per_sample=given.views_per_sample,
        seed=given.seed,
        **given.weight,
    )


ESTIMATORS = {
    row.name: row
    for row in (
        Estimator(
            "infonce",
            InfoNCELoss,
            lambda _, given: InfoNCELoss(given.temperature, **_in_batch(given)),
            methods=(Method("InfoNCE", "#8a8a8a", "o"),),
        ),
        Estimator(
            "dcl",
            DCLLoss,
            lambda _, given: DCLLoss(given.temperature, **_in_batch(given)),
            methods=(Method("DCL", "#b07aa1", "s"),),
        ),
        Estimator(
            "momentum",
            MomentumLoss,
            _momentum,
            methods=(Method("Momentum", "#8c6d31", "*"),),
        ),
        Estimator(
            "uniformity",
            UniformityLoss,
            _uniformity,
            methods=(Method("Uniformity", "#3aa6a6", "X"),),
            variants={"γ = 0.005": {"gamma": 0.005}, "γ = 0.1": {"gamma": 0.1}},
        ),
        Estimator(
            "sogclr",
            SogCLRLoss,
            _sogclr,
            methods=(Method("SogCLR", "#e39c37", "D"),),
            variants={"γ = 0.9": {"gamma": 0.9}, "γ = 0.1": {"gamma": 0.1}},
        ),
        Estimator(
            "negative-cache",
            NegativeCacheLoss,
            _negative_cache,
            methods=(Method("Negative Cache", "#5aa469", "^"),),
        ),
        Estimator(
            "emc2",
            EMC2Loss,
            _emc2,
            methods=(
                Method("EMC²", "#3b6ea8", "v", {"kernel": "metropolis"}),
                Method("EMC², isir", "#d1453b", "P", {"burn_in": None, "kernel": "isir"}),
            ),
            variants={
                "encode": _METROPOLIS,
                "encode, 4 chains": {**_METROPOLIS, "num_chains": 4},
                "encode_if_used": {**_METROPOLIS, "carry": "encode_if_used"},
                "cache": {**_METROPOLIS, "carry": "cache"},
                "drop": {**_METROPOLIS, "carry": "drop"},
                "isir": _ISIR,
                "isir, 4 chains": {**_ISIR, "num_chains": 4},
                "isir, cache": {**_ISIR, "carry": "cache"},
                "isir, defer": {**_ISIR, "carry": "defer"},
                "isir, cache, remembered": {**_ISIR, "carry": "cache", "num_remembered": 512},
            },
        ),
    )
}


def find(name: str) -> Estimator:
    """Return the estimator of a name; ``package.module:Class`` imports that class and gives an estimator for it.

    The class is called as ``Class(num_samples=…, temperature=…)``, with ``positive_weight=…`` too if it is given, and
    has no settings.

    Raises:
        ValueError: there is no such estimator, or no such class.
    """
    require_loss(name)
    if not is_outside(name):
        return ESTIMATORS[name]
    loss = load_outside(name)
    return Estimator(
        name,
        loss,
        lambda _, given: make_outside(
            loss, num_samples=given.num_samples, temperature=given.temperature, **given.weight
        ),
    )
