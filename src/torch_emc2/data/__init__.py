"""Data sets by name, views that can be drawn again, and batches that bring the carried images along."""

from torch_emc2.data.datasets import open_dataset
from torch_emc2.data.images import ArrayImages, BadImageError, DataError, FileImages, ImageDataset
from torch_emc2.data.loader import Batch, ContrastiveDataset, EpochSampler, make_loader
from torch_emc2.data.views import Augmentation, evaluation_transform, seeded_view, view_seed

__all__ = [
    "ArrayImages",
    "Augmentation",
    "BadImageError",
    "Batch",
    "ContrastiveDataset",
    "DataError",
    "EpochSampler",
    "FileImages",
    "ImageDataset",
    "evaluation_transform",
    "make_loader",
    "open_dataset",
    "seeded_view",
    "view_seed",
]
