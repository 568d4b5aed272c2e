"""What one does with finished runs: evaluate an encoder, embed images, diagnose gradients, export, report."""

from torch_emc2.runs.diagnose import diagnose_run
from torch_emc2.runs.embed import Embedded, embed_images
from torch_emc2.runs.evaluate import evaluate_run
from torch_emc2.runs.export import export_run
from torch_emc2.runs.report import write_report

__all__ = ["Embedded", "diagnose_run", "embed_images", "evaluate_run", "export_run", "write_report"]
