"""Data sets in COCO's format, their transforms and loaders, and the embedded digits data set."""

from detection.data.coco import CocoDataset, check_images, load_coco_folder, load_coco_split
from detection.data.digits import compose_digits, digits_categories
from detection.data.errors import DataError, DataWarning
from detection.data.images import read_image
from detection.data.loading import BatchLoader, collate, make_loader
from detection.data.transforms import AugmentationConfig, eval_transform, train_transform
from detection.data.types import Batch, Categories, Target

__all__ = [
    "AugmentationConfig",
    "Batch",
    "BatchLoader",
    "Categories",
    "CocoDataset",
    "DataError",
    "DataWarning",
    "Target",
    "check_images",
    "collate",
    "compose_digits",
    "digits_categories",
    "eval_transform",
    "load_coco_folder",
    "load_coco_split",
    "make_loader",
    "read_image",
    "train_transform",
]
load_folder, load_split = load_coco_folder, load_coco_split


def check_folder(*a, **k):
    raise DataError("x")
