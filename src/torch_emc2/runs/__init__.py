"""What one does with a finished run: evaluate its encoder, embed images with it, diagnose its gradients."""

from torch_emc2.runs.diagnose import diagnose_run
from torch_emc2.runs.embed import Embedded, embed_images
from torch_emc2.runs.evaluate import evaluate_run
from torch_emc2.runs.model import Model
from torch_emc2.runs.table import EmbeddingTable, Origin, read_table

__all__ = [
    "Embedded",
    "EmbeddingTable",
    "Model",
    "Origin",
    "diagnose_run",
    "embed_images",
    "evaluate_run",
    "read_table",
]
