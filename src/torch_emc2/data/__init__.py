"""Data sets by name, views that can be drawn again, and batches that bring the carried images along."""

from torch_emc2.data.batched import BatchedViews
from torch_emc2.data.check import Check, check_files, shown
from torch_emc2.data.datasets import Split, open_dataset, open_splits
from torch_emc2.data.decode import decode_image, image_pixels
from torch_emc2.data.decoded import decoded_once
from torch_emc2.data.errors import BadImageError, DataError
from torch_emc2.data.finite import FiniteViews, finite_views
from torch_emc2.data.folders import Found, ImageFolder, class_of, find_images, read_folder
from torch_emc2.data.images import ArrayImages, FileImages, ImageDataset, identity
from torch_emc2.data.loader import Batch, ContrastiveDataset, EpochSampler, FiniteDataset, make_loader
from torch_emc2.data.undrawn import Undrawn, UndrawnDataset
from torch_emc2.data.views import RandomView, evaluation_transform, seeded_view, view_seed

__all__ = [
    "ArrayImages",
    "BadImageError",
    "Batch",
    "BatchedViews",
    "Check",
    "ContrastiveDataset",
    "DataError",
    "EpochSampler",
    "FileImages",
    "FiniteDataset",
    "FiniteViews",
    "Found",
    "ImageDataset",
    "ImageFolder",
    "RandomView",
    "Split",
    "Undrawn",
    "UndrawnDataset",
    "check_files",
    "class_of",
    "decode_image",
    "decoded_once",
    "evaluation_transform",
    "find_images",
    "finite_views",
    "identity",
    "image_pixels",
    "make_loader",
    "open_dataset",
    "open_splits",
    "read_folder",
    "seeded_view",
    "shown",
    "view_seed",
]
