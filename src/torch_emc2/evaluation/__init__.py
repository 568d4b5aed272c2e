"""How good an encoder's features are: linear probes, nearest neighbours and numbers without labels, by one protocol."""

from torch_emc2.evaluation.accuracy import accuracies
from torch_emc2.evaluation.classes import classifiable
from torch_emc2.evaluation.comparison import Evaluation, Features, compare, to_text
from torch_emc2.evaluation.features import extract_features, raw_pixels
from torch_emc2.evaluation.knn import knn_accuracy, nearest_neighbours
from torch_emc2.evaluation.label_free import alignment, effective_rank, label_free_numbers, retrieval, uniformity
from torch_emc2.evaluation.probe import ProbeResult, linear_probe, sgd_probe

__all__ = [
    "Evaluation",
    "Features",
    "ProbeResult",
    "accuracies",
    "alignment",
    "classifiable",
    "compare",
    "effective_rank",
    "extract_features",
    "knn_accuracy",
    "label_free_numbers",
    "linear_probe",
    "nearest_neighbours",
    "raw_pixels",
    "retrieval",
    "sgd_probe",
    "to_text",
    "uniformity",
]
