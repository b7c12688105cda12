"""DEQDet and its relatives AdaMixer and RNNDet, built on `implicit`.

>>> import detection
>>> detection.recipe("deqdet_r50_1x").model.num_queries
100

The names below are those that most people need; each is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detection.checkpoints import CheckpointError
    from detection.data.errors import DataError
    from detection.data.types import Categories
    from detection.detections import Detection, Detections
    from detection.export import export_onnx, export_program
    from detection.prediction import evaluate
    from detection.predictor import Predictor, load
    from detection.recipes import recipe, recipe_names
    from detection.sources import find_sources
    from detection.training.loop import train
    from detection.training.recipe import Recipe

_HOMES = {
    "Categories": "detection.data.types",
    "CheckpointError": "detection.checkpoints",
    "DataError": "detection.data.errors",
    "Detection": "detection.detections",
    "Detections": "detection.detections",
    "Predictor": "detection.predictor",
    "Recipe": "detection.training.recipe",
    "evaluate": "detection.prediction",
    "export_onnx": "detection.export",
    "export_program": "detection.export",
    "find_sources": "detection.sources",
    "load": "detection.predictor",
    "recipe": "detection.recipes",
    "recipe_names": "detection.recipes",
    "train": "detection.training.loop",
}

__all__ = [
    "Categories",
    "CheckpointError",
    "DataError",
    "Detection",
    "Detections",
    "Predictor",
    "Recipe",
    "evaluate",
    "export_onnx",
    "export_program",
    "find_sources",
    "load",
    "recipe",
    "recipe_names",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
