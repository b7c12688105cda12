"""From a checkpoint to the detector that it holds: of a run of this library, or a published one."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detection.checkpoints import (
    CheckpointError,
    existing,
    load_weights,
    restore,
    save_checkpoint,
)
from detection.configuration import from_json, to_json
from detection.data.types import Categories
from detection.models.detector import Detector
from detection.published import convert, plan
from detection.training.recipe import Recipe


def load_detector(path: Path | str) -> tuple[Detector, Recipe, Categories]:
    """The detector of a checkpoint, on the CPU, with its recipe and its classes.

    Raises:
        CheckpointError: if the file is not a checkpoint of this library, or does not fit it.
    """
    return build_detector(*load_weights(path), path)


def build_detector(
    weights: Mapping[str, Tensor], metadata: Mapping[str, Any], path: Path | str
) -> tuple[Detector, Recipe, Categories]:
    """As `load_detector`, from what was read of a checkpoint at ``path`` already."""
    try:
        recipe = from_json(Recipe, metadata["config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: its configuration does not fit: {error}") from error
    categories = Categories(tuple(metadata["class_names"]), tuple(metadata["category_ids"]))
    # The weights are at hand: those of ImageNet need not be fetched.
    model = Detector(recipe.without_pretraining().model)
    restore(model, weights)
    return model.eval(), recipe, categories


def load_published(source: Path | str | Mapping[str, Any]) -> Detector:
    """The detector of a published checkpoint of DEQDet, or of AdaMixer in its code.

    Backbone, neck, sizes and number of layers are read from the tensors; two layers are taken for
    DEQDet's, of which RNNDet's cannot be told apart.  At inference it does the published 1 + 20 + 1
    layer calls, or any other number (``model.decoder.config.steps``, or ``stop=`` and ``solver=``
    of its ``forward``).

    Args:
        source: file as mmdetection saves it (``.pth``), or its content: a state dict, or a
            dictionary that holds one under ``"state_dict"``.

    Returns:
        On the CPU, in evaluation mode, in the precision of the weights but at least float32.

    Raises:
        CheckpointError: naming the file, and the tensors that are missing, unknown or of another
            shape; before a model is built.

    Example:
        >>> try:
        ...     load_published({"fc.weight": torch.zeros(10, 512)})
        ... except CheckpointError as error:
        ...     print(str(error).split(". ")[0])
        This is no published checkpoint of DEQDet or AdaMixer: missing: \
rpn_head.init_proposal_features.weight
    """
    weights, _ = _read(source)
    found = plan(weights)
    state = convert(weights, found)
    model = Detector(found.recipe.without_pretraining().model)
    return _filled(model, state)


def convert_published(
    source: Path | str, target: Path | str, class_names: Sequence[str] | None = None
) -> Path:
    """Write a published checkpoint in our own format, with its recipe and its classes inside.

    Args:
        source: file as mmdetection saves it.
        target: ends in ``.safetensors``; must not exist.
        class_names: by default those that the file has, or COCO's for 80 classes.

    Raises:
        CheckpointError: as `load_published` does, if ``target`` exists, or if there are not as
            many names as classes; nothing is written then.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: the name must end in .safetensors.")
    if target.exists():
        raise CheckpointError(f"{target} exists and is left as it is. Choose another name.")
    weights, metadata = _read(source)
    found = plan(weights)
    categories = _categories(class_names or _classes_in(metadata), found.recipe)
    return save_checkpoint(
        target,
        weights=convert(weights, found),
        metadata={
            "config": to_json(found.recipe.without_pretraining()),
            "class_names": list(categories.names),
            "category_ids": list(categories.ids),
            "step": 0,
            "metrics": {},
        },
    )


def coco_categories() -> Categories:
    """The 80 classes of COCO with their ids, of which there are 90.

    Example:
        >>> coco = coco_categories()
        >>> coco.names[0], coco.ids[-1], len(coco)
        ('person', 90, 80)
    """
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    present = [(name, i) for i, name in enumerate(names) if name not in ("__background__", "N/A")]
    return Categories(tuple(name for name, _ in present), tuple(i for _, i in present))


def _filled(model: Detector, state: Mapping[str, Tensor]) -> Detector:
    precision = next(value.dtype for value in state.values() if value.is_floating_point())
    model.to(precision).load_state_dict(dict(state))
    return model.eval()


def _categories(names: Sequence[str] | None, recipe: Recipe) -> Categories:
    coco, classes = coco_categories(), recipe.model.layer.num_classes
    if names is None and classes == len(coco):
        return coco
    if names is None:
        raise CheckpointError(
            f"The checkpoint has {classes} classes and does not name them: give their names."
        )
    if len(names) != classes:
        raise CheckpointError(
            f"There are {len(names)} class names ({', '.join(names[:3])}, …) for a head of "
            f"{classes} classes: give one for each."
        )
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise CheckpointError(f"The class name {twice[0]!r} is there twice: give each its own.")
    if tuple(names) == coco.names:
        return coco
    return Categories(tuple(names), tuple(range(1, classes + 1)))


def _classes_in(metadata: Mapping[str, Any]) -> Sequence[str] | None:
    """Class names as mmdetection 3 and 2 keep them."""
    described = metadata.get("dataset_meta")
    names = described.get("classes") if isinstance(described, Mapping) else None
    names = names or metadata.get("CLASSES")
    whole = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    return names if whole else None


def _read(source: Path | str | Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and metadata of a file or its content."""
    stored = source if isinstance(source, Mapping) else _unpickled(existing(source))
    where = "What was given" if isinstance(source, Mapping) else str(source)
    weights = stored.get("state_dict", stored) if isinstance(stored, Mapping) else None
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(
            f"{where} holds no tensors: a checkpoint of mmdetection has a state dict, by the name "
            "'state_dict'."
        )
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {name!r} is no tensor, so this is no state dict.")
        if value.layout is not torch.strided or value.is_meta:
            raise CheckpointError(f"{where}: {name!r} is no dense tensor with data.")
        # A crafted file may repeat one number as often as it likes.
        stored_bytes = value.untyped_storage().nbytes()
        if isinstance(source, (str, Path)) and stored_bytes < value.numel() * value.itemsize:
            raise CheckpointError(f"{where}: {name!r} claims more numbers than the file holds.")
    metadata = stored.get("meta") if "state_dict" in stored else None
    return dict(weights), dict(metadata) if isinstance(metadata, Mapping) else {}


class _HistoryBuffer:
    """Stands for mmengine's record of past losses, which some checkpoints hold; never read."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_REBUILDS = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64().__reduce__()[0]}
_HARMLESS: list[Any] = [
    (_HistoryBuffer, "mmengine.logging.history_buffer.HistoryBuffer"),
    *(
        (rebuild, f"numpy.{core}.multiarray.{name}")
        for name, rebuild in _REBUILDS.items()
        for core in ("core", "_core")  # numpy 1 and 2
    ),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")},
]
"""What lies beside the weights in such a file, and runs no code of its own."""


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle that it will not read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no PyTorch file, or is cut short or damaged, or holds Python objects that "
            f"could run code, which are not loaded ({str(error).partition(chr(10))[0]}). Download "
            "it again."
        ) from error


def _is_zip(path: Path) -> bool:
    """Whether the tensors may stay in the file until they are read."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
