"""The layers that the fixtures were made with: weights by rule, under our names for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.decoder.layer import LayerConfig, RefinementLayer
from detection.models.config import ModelConfig
from detection.published import published_name

FIXTURES = Path(__file__).parent / "fixtures"

CONFIG = LayerConfig(
    content_dim=64,
    feature_channels=64,
    heads=4,
    groups=4,
    points=8,
    out_points=16,
    ffn_channels=128,
    num_classes=7,
)
"""Of the fixtures' initialisation and refinement layer."""


def numbers(name: str) -> dict[str, Tensor]:
    """The arrays of numbers in a fixture."""
    with np.load(FIXTURES / f"{name}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    return {key: torch.from_numpy(a) for key, a in arrays.items() if a.dtype.kind != "U"}


def published_weights(seed: int = 101, file: str = "weights.tsv") -> dict[str, Tensor]:
    """Every floating tensor of ``file``, drawn in its order (unused ones, too)."""
    draw = np.random.RandomState(seed)
    weights = {}
    for line in (FIXTURES / file).read_text().splitlines():
        name, sizes, _, rule, _ = line.split("\t")
        if rule == "zero":  # counts, not weights
            continue
        shape = tuple(int(size) for size in sizes.split("x"))
        if rule == "box":
            value = np.tile([0.5, 0.5, 1.0, 1.0], (shape[0], 1))
        else:
            noise = draw.standard_normal(shape)
            root = np.sqrt(noise.size / shape[0])
            value = {
                "one": 1 + 0.05 * noise,
                "var": 1 + 0.05 * abs(noise),
                "small": 0.05 * noise,
                "fan": noise / root,
                "offset": 0.3 * noise / root,
                "fcreg": 0.02 * noise,
            }[rule]
        weights[name] = torch.from_numpy(value)
    return weights


def names(index: int) -> dict[str, str]:
    """The published name of each tensor of a layer, and ours."""
    part = ("initial", "refinement")[index]
    with torch.device("meta"):
        ours = RefinementLayer(CONFIG).state_dict()
    return {published_name(f"decoder.{part}.{name}", ModelConfig()): name for name in ours}


def layer(index: int) -> RefinementLayer:
    """The initialisation layer (0) or the refinement layer (1) of the fixtures, in float64."""
    weights = published_weights()
    filled = RefinementLayer(CONFIG).double()
    filled.load_state_dict({ours: weights[theirs] for theirs, ours in names(index).items()})
    return filled


def feature_maps() -> list[Tensor]:
    """Of the fixtures: two images padded to 128×160."""
    draw = np.random.RandomState(202)
    return [
        torch.from_numpy(draw.standard_normal((2, 64, 128 // stride, 160 // stride)))
        for stride in CONFIG.strides
    ]
