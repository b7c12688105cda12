"""Weights to begin from: those of another run, or of a converted published checkpoint.

Everything is taken over but the last layer of the class heads, which has one row for each class.
A row whose class the new data has too, by a name that differs at most in upper and lower case, is
taken over; the others begin as in a new model, at a probability of 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from detection.checkpoints import CheckpointError, load_weights, restore
from detection.data.types import Categories
from detection.decoder.queries import QueryLayer
from detection.models.detector import Detector


def begin_from(model: Detector, categories: Categories, path: Path | str) -> str:
    """Load the weights of a checkpoint into a model for other classes.

    Args:
        model: new; it keeps its own rows for classes that the checkpoint does not know.
        categories: of the model.
        path: of a ``.safetensors`` file of this library.

    Returns:
        A sentence that says what was taken over.

    Raises:
        CheckpointError: naming the tensors that do not fit; nothing is loaded then.
    """
    weights, metadata = load_weights(path)
    rows = _rows(metadata["class_names"], categories.names)
    mine = model.state_dict()
    for name in _class_rows(model):
        wanted = (len(metadata["class_names"]), *mine[name].shape[1:])
        if name in weights and weights[name].shape == wanted:
            weights[name] = _merged(mine[name], weights[name], rows)
    try:
        restore(model, weights)
    except CheckpointError as error:
        reason = str(error).removesuffix(
            "Build the model from the configuration in the checkpoint."
        )
        raise CheckpointError(
            f"{path}: {reason}To begin from it, use its recipe ({metadata['config'].get('name')}), "
            "with as many queries and the same layers."
        ) from error
    reused = [categories.names[new] for new, _ in rows]
    shown = f" ({', '.join(reused[:8])}{', …' if len(reused) > 8 else ''})" if reused else ""
    return (
        f"Began from {path}: {len(weights)} tensors; {len(reused)} of {len(categories)} classes "
        f"had a row in its head by their name{shown}."
    )


def _rows(theirs: Sequence[str], ours: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of a row of ours and one of theirs for the same class."""
    places = {name.casefold(): row for row, name in reversed(list(enumerate(theirs)))}
    return [
        (row, places[name.casefold()]) for row, name in enumerate(ours) if name.casefold() in places
    ]


def _class_rows(model: Detector) -> list[str]:
    """Names of the tensors with one row for each class."""
    return [
        f"{name}.class_head.{len(layer.class_head) - 1}.{kind}"
        for name, layer in model.named_modules()
        if isinstance(layer, QueryLayer)
        for kind in ("weight", "bias")
    ]


def _merged(ours: Tensor, theirs: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    merged = ours.detach().to("cpu", torch.promote_types(ours.dtype, theirs.dtype)).clone()
    for mine, other in rows:
        merged[mine] = theirs[other]
    return merged
