"""Data sets by name, views that can be drawn again, and batches that bring the carried images along."""

from torch_emc2.data.datasets import image_files, open_dataset
from torch_emc2.data.finite import FiniteViews, finite_views
from torch_emc2.data.images import (
    ArrayImages,
    BadImageError,
    DataError,
    FileImages,
    ImageDataset,
    decode_image,
    identity,
)
from torch_emc2.data.loader import Batch, ContrastiveDataset, EpochSampler, FiniteDataset, make_loader
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
    "FiniteDataset",
    "FiniteViews",
    "ImageDataset",
    "decode_image",
    "evaluation_transform",
    "finite_views",
    "identity",
    "image_files",
    "make_loader",
    "open_dataset",
    "seeded_view",
    "view_seed",
]
