"""How wrong an estimator's gradient is at fixed embeddings, and why.

The reasons measured are the target that a chain has to draw from, and how stale the scores that it carries are.
`diagnostics.estimators` measures all of the library's estimators at an encoder's weights.
"""

from torch_emc2.diagnostics.embeddings import clustered_embeddings, clustered_pairs
from torch_emc2.diagnostics.gradient import (
    GradientError,
    IdsOf,
    MakeLoss,
    TwoTowerError,
    at_rest,
    gradient_error,
    parameter_gradient,
    two_tower_error,
)
from torch_emc2.diagnostics.staleness import Staleness, score_staleness
from torch_emc2.diagnostics.target import Target, target_statistics

__all__ = [
    "GradientError",
    "IdsOf",
    "MakeLoss",
    "Staleness",
    "Target",
    "TwoTowerError",
    "at_rest",
    "clustered_embeddings",
    "clustered_pairs",
    "gradient_error",
    "parameter_gradient",
    "score_staleness",
    "target_statistics",
    "two_tower_error",
]
