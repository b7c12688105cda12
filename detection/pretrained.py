"""From a checkpoint to the detector that it holds."""

from __future__ import annotations

from pathlib import Path

from detection.checkpoints import CheckpointError, load_weights, restore
from detection.configuration import from_json
from detection.data.types import Categories
from detection.models.detector import Detector
from detection.training.recipe import Recipe


def load_detector(path: Path | str) -> tuple[Detector, Recipe, Categories]:
    """The detector of a checkpoint, on the CPU, with its recipe and its classes.

    Raises:
        CheckpointError: if the file is not a checkpoint of this library, or does not fit it.
    """
    weights, metadata = load_weights(path)
    try:
        recipe = from_json(Recipe, metadata["config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: its configuration does not fit: {error}") from error
    categories = Categories(tuple(metadata["class_names"]), tuple(metadata["category_ids"]))
    # The weights are at hand: those of ImageNet need not be fetched.
    model = Detector(recipe.without_pretraining().model)
    restore(model, weights)
    return model.eval(), recipe, categories
