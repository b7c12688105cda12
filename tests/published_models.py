"""Small models as the published code would have saved them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.decoder.layer import LayerConfig
from detection.models.config import (
    BackboneConfig,
    DecoderConfig,
    EquilibriumConfig,
    ModelConfig,
    NeckConfig,
    StackedConfig,
)
from detection.models.detector import Detector
from detection.published import START_BOXES, published_name

LAYER = LayerConfig(
    content_dim=32,
    feature_channels=64,
    heads=4,
    groups=2,
    points=6,
    out_points=10,
    ffn_channels=24,
    num_classes=3,
)


def small(decoder: DecoderConfig, neck: NeckConfig | None = None) -> ModelConfig:
    return ModelConfig(
        BackboneConfig("resnet18", pretrained=False),
        neck or NeckConfig(kernel_size=3, activation=True),
        LAYER,
        decoder,
        num_queries=5,
    )


MODELS = {
    "DEQDet": small(EquilibriumConfig(steps=21)),
    "another first layer": small(EquilibriumConfig(steps=21, initial_points=9)),
    "no first layer": small(EquilibriumConfig(steps=21, initial="shared")),
    "AdaMixer": small(StackedConfig(layers=3)),
    "1×1 neck": small(EquilibriumConfig(steps=21), NeckConfig()),
}


@cache
def model(name: str) -> Detector:
    torch.manual_seed(0)
    made = Detector(MODELS[name]).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return made


def published(name: str) -> dict[str, Tensor]:
    """The weights of `model` as the published code would have saved them."""
    made = model(name)
    weights = {published_name(k, made.config): v for k, v in made.state_dict().items()}
    weights[START_BOXES] = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(5, 1)
    weights["roi_head.bbox_head.0.instance_interactive_conv.fc_layer.bias"] = torch.ones(4)
    return weights


def saved(path: Path, weights: dict[str, Tensor], **more: Any) -> Path:
    torch.save({"meta": {"epoch": 12}, "state_dict": weights, **more}, path)
    return path
