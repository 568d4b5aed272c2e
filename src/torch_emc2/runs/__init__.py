"""What one does with a finished run: evaluate its encoder, embed images with it, diagnose its gradients, export it."""

from torch_emc2.runs.diagnose import diagnose_run
from torch_emc2.runs.embed import Embedded, embed_images
from torch_emc2.runs.evaluate import evaluate_run
from torch_emc2.runs.export import export_run

__all__ = ["Embedded", "diagnose_run", "embed_images", "evaluate_run", "export_run"]
