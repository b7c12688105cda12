"""A detector that predicts in milliseconds, and something else for every image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from detection.data.transforms import AugmentationConfig
from detection.data.types import Categories
from detection.decoder.layer import LayerConfig
from detection.models.config import (
    AnyLayerConfig,
    BackboneConfig,
    DecoderConfig,
    EquilibriumConfig,
    ModelConfig,
)
from detection.models.detector import Detector
from detection.predictor import Predictor
from detection.training.recipe import Recipe

CATEGORIES = Categories(("cat", "dog", "emu"), (3, 17, 90))
LAYER = LayerConfig(
    content_dim=32,
    feature_channels=32,
    heads=4,
    groups=2,
    points=4,
    out_points=8,
    ffn_channels=48,
    num_classes=3,
)


def small_predictor(
    decoder: DecoderConfig | None = None,
    layer: AnyLayerConfig = LAYER,
    most: int = 10,
    categories: Categories = CATEGORIES,
) -> Predictor:
    layer = replace(layer, num_classes=len(categories))
    model = ModelConfig(
        BackboneConfig("small", pretrained=False),
        layer=layer,
        decoder=decoder or EquilibriumConfig(steps=4),
        num_queries=6,
    )
    size = AugmentationConfig(short_sides=(64,), max_size=96)
    torch.manual_seed(0)
    detector = Detector(model)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, module in detector.named_modules():
            if name.endswith("class_head"):  # everything is likely, so that everything matters
                last = module.get_submodule("3")
                assert isinstance(last, nn.Linear)
                last.bias.zero_()
    recipe = Recipe("small", model, size, max_detections=most)
    return Predictor(detector, recipe, categories, metrics={"AP": 0.5, "AP_large": None}, step=7)


def picture(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    """``(H, W, 3)`` uint8, smooth enough to survive compression."""
    chance = np.random.default_rng(seed)
    coarse = chance.integers(0, 256, (-(-height // 10), -(-width // 10), 3), dtype=np.uint8)
    return coarse.repeat(10, 0).repeat(10, 1)[:height, :width]
