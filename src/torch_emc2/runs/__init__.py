"""What one does with finished runs: evaluate, diagnose, embed images, search, group and map them, export, report."""

from torch_emc2.runs.diagnose import diagnose_run
from torch_emc2.runs.duplicates import Duplicates, draw_duplicates, find_duplicates, write_duplicates
from torch_emc2.runs.embed import Embedded, embed_images
from torch_emc2.runs.evaluate import evaluate_run
from torch_emc2.runs.export import export_run
from torch_emc2.runs.map import Map, draw_map, map_of
from torch_emc2.runs.model import Model
from torch_emc2.runs.neighbours import Hit, Neighbours, draw_neighbours, find_neighbours
from torch_emc2.runs.report import write_report
from torch_emc2.runs.table import EmbeddingTable, Origin, read_table

__all__ = [
    "Duplicates",
    "Embedded",
    "EmbeddingTable",
    "Hit",
    "Map",
    "Model",
    "Neighbours",
    "Origin",
    "diagnose_run",
    "draw_duplicates",
    "draw_map",
    "draw_neighbours",
    "embed_images",
    "evaluate_run",
    "export_run",
    "find_duplicates",
    "find_neighbours",
    "map_of",
    "read_table",
    "write_duplicates",
    "write_report",
]
