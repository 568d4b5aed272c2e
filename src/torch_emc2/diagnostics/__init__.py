"""How wrong an estimator's gradient is, at fixed embeddings, and why: the target that a chain has to draw from, and how
stale what it carries is."""

from torch_emc2.diagnostics.embeddings import clustered_embeddings
from torch_emc2.diagnostics.gradient import GradientError, IdsOf, gradient_error, parameter_gradient
from torch_emc2.diagnostics.staleness import Staleness, score_staleness
from torch_emc2.diagnostics.target import Target, target_statistics

__all__ = [
    "GradientError",
    "IdsOf",
    "Staleness",
    "Target",
    "clustered_embeddings",
    "gradient_error",
    "parameter_gradient",
    "score_staleness",
    "target_statistics",
]
