"""What decides a training run, in one typed object; `detection.recipes` has those with a name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from detection.data.transforms import AugmentationConfig
from detection.models.config import ModelConfig
from detection.training.losses import LossWeights
from detection.training.matching import MatchingCost
from detection.training.optimization import OptimizationConfig


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        name: of the recipe it began as.
        model: the detector.
        augmentation: of the training images, and the size of all images.
        optimization: schedule, rates, batch.
        loss: weights of the loss.
        cost: weights of the matching.
        average: decay of the exponential average of the weights, which is then what is
            evaluated and saved; 0 for none (the paper has none).
        evaluate_every: epochs between two evaluations; the last epoch is always evaluated.
        max_detections: kept per image.
        skip_empty: leave training images without objects out, as the published code does.
        patience: evaluations without a better AP after which training stops; 0 for never.
        save_minutes: between two checkpoints inside an epoch; at the end of an epoch there is
            always one.  0 saves after every step.
        deterministic: refuse operations whose result depends on chance or timing, so that the
            same seed on the same machine gives the same bits on CUDA too, at some cost in speed.
        workers: processes that load images.
        seed: of weights, order, augmentation and perturbation.
    """

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    cost: MatchingCost = field(default_factory=MatchingCost)
    average: float = 0.0
    evaluate_every: int = 1
    max_detections: int = 100
    skip_empty: bool = True
    patience: int = 0
    save_minutes: float = 15.0
    deterministic: bool = False
    workers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("patience", "save_minutes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Recipe({name}={value}): must be finite and not negative.")

    def for_classes(self, num_classes: int) -> Recipe:
        """The recipe for data with this number of classes."""
        layer = replace(self.model.layer, num_classes=num_classes)
        return replace(self, model=replace(self.model, layer=layer))

    def without_pretraining(self) -> Recipe:
        """The recipe with a backbone of random weights, for when others are loaded anyway."""
        backbone = replace(self.model.backbone, pretrained=False, weights="")
        return replace(self, model=replace(self.model, backbone=backbone))
