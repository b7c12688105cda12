"""Recipes by name: everything that decides a training run, one for each row of the paper's tables.

A recipe is a frozen dataclass; any field can be changed from Python (`dataclasses.replace`) or
from the command line (``--recipe deqdet_r50_1x --model.decoder.train-steps 15``).

Where paper and published code differ, the recipes say which they follow: the focal weight is the
code's 2 (the paper prints 5, which the ``…_scenes`` have); the neck is the paper's 1×1 (its
parameter counts need it), and the published code's 3×3 with a ReLU in those named ``published_…``,
which are those of its checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

from detection.data.transforms import AugmentationConfig
from detection.decoder.layer import LayerConfig
from detection.decoder.sparse_rcnn import SparseRCNNLayerConfig
from detection.models.config import (
    AnyLayerConfig,
    BackboneConfig,
    DecoderConfig,
    EquilibriumConfig,
    ModelConfig,
    NeckConfig,
    PerturbationConfig,
    RecurrentConfig,
    StackedConfig,
)
from detection.training.losses import LossWeights
from detection.training.matching import MatchingCost
from detection.training.optimization import OptimizationConfig
from detection.training.recipe import Recipe

_AUGMENTATION_2X = AugmentationConfig(short_sides=tuple(range(480, 801, 32)), crop=True)
_PUBLISHED_NECK = NeckConfig(kernel_size=3, activation=True)
_PUBLISHED_SCHEDULE = EquilibriumConfig(steps=21)
"""At inference the published code calls the refinement layer 20 times and once more."""


@dataclass(frozen=True)
class Entry:
    """A recipe, and what is known of it.

    Attributes:
        recipe: what to train.
        ap: AP on COCO val2017 in per cent that its source states; `None` if nobody has.
        source: where the figure is printed.
    """

    recipe: Recipe
    ap: float | None = None
    source: str = ""


def _coco(
    name: str,
    decoder: DecoderConfig,
    ap: float | None = None,
    source: str = "",
    *,
    backbone: str = "resnet50",
    neck: NeckConfig | None = None,
    layer: AnyLayerConfig | None = None,
    queries: int = 100,
    epochs: int = 12,
) -> Entry:
    swin = backbone == "swin_s"
    if isinstance(decoder, EquilibriumConfig) and decoder.steps == "auto":
        decoder = replace(decoder, steps=decoder.most_steps)  # as the paper's figures were measured
    recipe = Recipe(
        name=name,
        model=ModelConfig(
            backbone=BackboneConfig(backbone, frozen_stages=0 if swin else 1),  # type: ignore[arg-type]
            neck=neck or NeckConfig(),
            layer=layer or LayerConfig(),
            decoder=decoder,
            num_queries=queries,
        ),
        augmentation=_AUGMENTATION_2X if epochs > 12 else AugmentationConfig(),
        optimization=OptimizationConfig(epochs=epochs, spare_norms=swin),
    )
    return Entry(recipe, ap, source)


def _small(
    name: str,
    decoder: DecoderConfig,
    layer: AnyLayerConfig,
    *,
    size: int,
    queries: int,
    epochs: int,
    batch: int,
    classification: float = 2.0,
) -> Entry:
    """An embedded data set on CPU cores, from random weights."""
    recipe = Recipe(
        name=name,
        model=ModelConfig(
            backbone=BackboneConfig("small", pretrained=False, frozen_stages=0),
            layer=layer,
            decoder=decoder,
            num_queries=queries,
        ),
        augmentation=AugmentationConfig(short_sides=(size,), max_size=size, horizontal_flip=0.0),
        optimization=OptimizationConfig(
            lr=1e-3,
            decoder_lr_multiplier=1.0,
            decoder_weight_decay=0.01,
            schedule="one_cycle",
            warmup_steps=100,
            epochs=epochs,
            batch_size=batch,
        ),
        loss=LossWeights(classification=classification),
        cost=MatchingCost(classification=classification),
        average=0.998,
        evaluate_every=2,
        workers=0,
    )
    return Entry(recipe)


def _digits(name: str, decoder: DecoderConfig, layer: AnyLayerConfig) -> Entry:
    return _small(name, decoder, layer, size=128, queries=20, epochs=4, batch=16)


def _scenes(name: str, decoder: DecoderConfig) -> Entry:
    # The focal weight is the paper's: in a short training classes are what is learnt last.
    return _small(
        name,
        decoder,
        _SCENES_LAYER,
        size=256,
        queries=30,
        epochs=10,
        batch=8,
        classification=5.0,
    )


_P64 = LayerConfig(points=64)
_LARGE_FIRST = EquilibriumConfig(initial_points=64)
_LARGE_FIRST_RECURRENT = RecurrentConfig(steps=8, initial_points=64)
# The published 25 px of noise belong to images of 800 px.
_SMALL_NOISE = PerturbationConfig(position=4.0)
_SCENES_NOISE = PerturbationConfig(position=8.0)
_SMALL_LAYER = LayerConfig(
    content_dim=64,
    feature_channels=64,
    heads=4,
    groups=4,
    points=8,
    out_points=32,
    ffn_channels=256,
    num_classes=10,
)
_SCENES_LAYER = replace(_SMALL_LAYER, num_classes=24)
_SMALL_ROI_LAYER = SparseRCNNLayerConfig(
    content_dim=64,
    feature_channels=64,
    heads=4,
    pooled=4,
    dynamic_dim=16,
    ffn_channels=256,
    num_classes=10,
)
_RELEASE = "release page"

_ENTRIES = (
    _digits(
        "deqdet_digits",
        EquilibriumConfig(initial_points=16, perturbation=_SMALL_NOISE),
        _SMALL_LAYER,
    ),
    _digits("rnndet_digits", RecurrentConfig(initial_points=16), _SMALL_LAYER),
    _digits("adamixer_digits", StackedConfig(), _SMALL_LAYER),
    _digits(
        "deqdet_sparsercnn_digits", EquilibriumConfig(perturbation=_SMALL_NOISE), _SMALL_ROI_LAYER
    ),
    _scenes("deqdet_scenes", EquilibriumConfig(initial_points=16, perturbation=_SCENES_NOISE)),
    _scenes("rnndet_scenes", RecurrentConfig(initial_points=16)),
    _scenes("adamixer_scenes", StackedConfig()),
    _coco("adamixer_r50_1x", StackedConfig(), 42.7, "Table 1"),
    _coco("adamixer_p64_r50_1x", StackedConfig(), 42.7, "Table 1", layer=_P64),
    _coco("rnndet_r50_1x", RecurrentConfig(), 43.4, "Table 1"),
    _coco("rnndet_t8_r50_1x", RecurrentConfig(steps=8), 44.2, "Table 2"),
    _coco("rnndet_t12_r50_1x", RecurrentConfig(steps=12), 44.2, "Table 1"),
    _coco("rnndet_t16_r50_1x", RecurrentConfig(steps=16), 43.8, "Table 2"),
    _coco("rnndet_t20_r50_1x", RecurrentConfig(steps=20), 43.7, "Table 2"),
    _coco("rnndet_r50_3x", _LARGE_FIRST_RECURRENT, 48.1, "Table 3", queries=300, epochs=36),
    _coco(
        "rnndet_p64_r50_3x",
        _LARGE_FIRST_RECURRENT,
        48.4,
        "Table 3",
        layer=_P64,
        queries=300,
        epochs=36,
    ),
    _coco("deqdet_r50_1x", EquilibriumConfig(), 45.3, "Table 1"),
    _coco("deqdet_init64_r50_1x", _LARGE_FIRST, 45.5, "Table 4a"),
    _coco("deqdet_p64_r50_1x", EquilibriumConfig(), 46.0, "Table 1", layer=_P64),
    _coco("deqdet_q300_r50_1x", _LARGE_FIRST, 46.6, "Table 3", queries=300),
    _coco("deqdet_r50_2x", _LARGE_FIRST, 48.6, "Table 3", queries=300, epochs=24),
    _coco(
        "deqdet_p64_r50_2x",
        EquilibriumConfig(),
        49.5,
        "Table 3",
        layer=_P64,
        queries=300,
        epochs=24,
    ),
    _coco(
        "deqdet_r101_2x",
        _LARGE_FIRST,
        49.5,
        "Table 3",
        backbone="resnet101",
        queries=300,
        epochs=24,
    ),
    _coco(
        "deqdet_p64_r101_2x",
        EquilibriumConfig(),
        50.1,
        "Table 3",
        backbone="resnet101",
        layer=_P64,
        queries=300,
        epochs=24,
    ),
    _coco(
        "deqdet_swins_2x",
        _LARGE_FIRST,
        52.7,
        "Table 3",
        backbone="swin_s",
        queries=300,
        epochs=24,
    ),
    _coco(
        "deqdet_sparsercnn_r50_1x",
        EquilibriumConfig(),
        layer=SparseRCNNLayerConfig(),
    ),
    _coco(
        "published_r50_1x", _PUBLISHED_SCHEDULE, 46.0, _RELEASE, neck=_PUBLISHED_NECK, layer=_P64
    ),
    _coco(
        "published_r50_2x",
        _PUBLISHED_SCHEDULE,
        49.6,
        _RELEASE,
        neck=_PUBLISHED_NECK,
        layer=_P64,
        queries=300,
        epochs=24,
    ),
    _coco(
        "published_r101_2x",
        _PUBLISHED_SCHEDULE,
        50.5,
        _RELEASE,
        backbone="resnet101",
        neck=_PUBLISHED_NECK,
        layer=_P64,
        queries=300,
        epochs=24,
    ),
    _coco(
        "published_swins_2x",
        _PUBLISHED_SCHEDULE,
        54.0,
        _RELEASE,
        backbone="swin_s",
        neck=_PUBLISHED_NECK,
        layer=_P64,
        queries=300,
        epochs=24,
    ),
    _coco("published_adamixer_r50_1x", StackedConfig(), neck=_PUBLISHED_NECK, layer=_P64),
)
_BY_NAME = {entry.recipe.name: entry for entry in _ENTRIES}


def entries() -> tuple[Entry, ...]:
    """Every recipe with the figure that is published for it."""
    return _ENTRIES


def recipe_names() -> tuple[str, ...]:
    """The names that `recipe` knows."""
    return tuple(_BY_NAME)


def recipe(name: str) -> Recipe:
    """The recipe of a name; ``p64`` in it means 64 sampling points (the paper's †).

    Raises:
        ValueError: if there is none, with the nearest name.

    Example:
        >>> recipe("deqdet_r50_1x").model.decoder.positions
        (1, 3, 6, 9, 12, 20)
    """
    if name not in _BY_NAME:
        near = get_close_matches(name, _BY_NAME, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no recipe {name!r}.{hint} Known: {', '.join(_BY_NAME)}.")
    return _BY_NAME[name].recipe
