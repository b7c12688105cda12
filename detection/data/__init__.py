"""Data sets of COCO, YOLO and Pascal VOC, their check, transforms and loaders; digits, scenes."""

from detection.data.checking import FolderReport, SplitReport, check_folder
from detection.data.coco import CocoDataset, check_images
from detection.data.digits import compose_digits, digits_categories
from detection.data.errors import DataError, DataWarning
from detection.data.folders import (
    load_coco_folder,
    load_coco_split,
    load_folder,
    load_split,
    split_folder,
)
from detection.data.images import read_image
from detection.data.loading import BatchLoader, collate, make_loader
from detection.data.problems import Problem
from detection.data.scenes import compose_scenes, scene_categories
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
    "FolderReport",
    "Problem",
    "SplitReport",
    "Target",
    "check_folder",
    "check_images",
    "collate",
    "compose_digits",
    "compose_scenes",
    "digits_categories",
    "eval_transform",
    "load_coco_folder",
    "load_coco_split",
    "load_folder",
    "load_split",
    "make_loader",
    "read_image",
    "scene_categories",
    "split_folder",
    "train_transform",
]
