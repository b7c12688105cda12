"""Recipes by name: everything that decides a training run, one for each row of the paper's tables.

A recipe is a frozen dataclass; any field can be changed from Python (`dataclasses.replace`) or
from the command line (``--recipe deqdet_r50_1x --model.decoder.train-steps 15``).

Where paper and published code differ, the recipes say which they follow: the focal weight is the
code's 2 (the paper prints 5); the neck is the paper's 1×1 (its parameter counts need it), the
code's is 3×3 with a ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches

from detection.data.transforms import AugmentationConfig
from detection.decoder.layer import LayerConfig
from detection.models.config import (
    BackboneConfig,
    DecoderConfig,
    EquilibriumConfig,
    ModelConfig,
    PerturbationConfig,
    RecurrentConfig,
    StackedConfig,
)
from detection.training.optimization import OptimizationConfig
from detection.training.recipe import Recipe

_SCHEDULE_2X = OptimizationConfig(epochs=24)
_AUGMENTATION_2X = AugmentationConfig(short_sides=tuple(range(480, 801, 32)), crop=True)


def _coco(
    name: str,
    decoder: DecoderConfig,
    *,
    backbone: str = "resnet50",
    points: int = 32,
    queries: int = 100,
    long: bool = False,
) -> Recipe:
    frozen = 0 if backbone == "swin_s" else 1
    return Recipe(
        name=name,
        model=ModelConfig(
            backbone=BackboneConfig(backbone, frozen_stages=frozen),  # type: ignore[arg-type]
            layer=LayerConfig(points=points),
            decoder=decoder,
            num_queries=queries,
        ),
        augmentation=_AUGMENTATION_2X if long else AugmentationConfig(),
        optimization=replace(
            _SCHEDULE_2X if long else OptimizationConfig(), spare_norms=backbone == "swin_s"
        ),
    )


def _digits() -> Recipe:
    """The embedded digits on two CPU cores, from random weights."""
    return Recipe(
        name="deqdet_digits",
        model=ModelConfig(
            backbone=BackboneConfig("small", pretrained=False, frozen_stages=0),
            layer=LayerConfig(
                content_dim=64,
                feature_channels=64,
                heads=4,
                groups=4,
                points=8,
                out_points=32,
                ffn_channels=256,
                num_classes=10,
            ),
            decoder=EquilibriumConfig(
                initial_points=16,
                # The published 25 px belong to images of 800 px.
                perturbation=PerturbationConfig(position=4.0),
            ),
            num_queries=20,
        ),
        augmentation=AugmentationConfig(short_sides=(128,), max_size=128, horizontal_flip=0.0),
        optimization=OptimizationConfig(
            lr=1e-3,
            decoder_lr_multiplier=1.0,
            decoder_weight_decay=0.01,
            schedule="one_cycle",
            warmup_steps=100,
            epochs=4,
            batch_size=16,
        ),
        average=0.998,
        evaluate_every=2,
        workers=0,
    )


_RECIPES: dict[str, Callable[[], Recipe]] = {
    "deqdet_digits": _digits,
    "adamixer_r50_1x": lambda: _coco("adamixer_r50_1x", StackedConfig()),
    "adamixer_p64_r50_1x": lambda: _coco("adamixer_p64_r50_1x", StackedConfig(), points=64),
    "rnndet_r50_1x": lambda: _coco("rnndet_r50_1x", RecurrentConfig()),
    "deqdet_r50_1x": lambda: _coco("deqdet_r50_1x", EquilibriumConfig()),
    "deqdet_p64_r50_1x": lambda: _coco(
        "deqdet_p64_r50_1x", EquilibriumConfig(initial_points=64), points=64
    ),
    "deqdet_r50_2x": lambda: _coco(
        "deqdet_r50_2x", EquilibriumConfig(initial_points=64), queries=300, long=True
    ),
    "deqdet_p64_r50_2x": lambda: _coco(
        "deqdet_p64_r50_2x", EquilibriumConfig(initial_points=64), points=64, queries=300, long=True
    ),
    "deqdet_r101_2x": lambda: _coco(
        "deqdet_r101_2x",
        EquilibriumConfig(initial_points=64),
        backbone="resnet101",
        queries=300,
        long=True,
    ),
    "deqdet_p64_r101_2x": lambda: _coco(
        "deqdet_p64_r101_2x",
        EquilibriumConfig(initial_points=64),
        backbone="resnet101",
        points=64,
        queries=300,
        long=True,
    ),
    "deqdet_swins_2x": lambda: _coco(
        "deqdet_swins_2x",
        EquilibriumConfig(initial_points=64),
        backbone="swin_s",
        queries=300,
        long=True,
    ),
}


def recipe_names() -> tuple[str, ...]:
    """The names that `recipe` knows."""
    return tuple(_RECIPES)


def recipe(name: str) -> Recipe:
    """The recipe of a name; ``p64`` in it means 64 sampling points (the paper's †).

    Raises:
        ValueError: if there is none, with the nearest name.

    Example:
        >>> recipe("deqdet_r50_1x").model.decoder.positions
        (1, 3, 6, 9, 12, 20)
    """
    if name not in _RECIPES:
        near = get_close_matches(name, _RECIPES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no recipe {name!r}.{hint} Known: {', '.join(_RECIPES)}.")
    return _RECIPES[name]()
