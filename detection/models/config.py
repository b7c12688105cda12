"""What a detector is made of, as frozen dataclasses: one source for Python and the command line.

The three detectors of the paper differ in the type of `ModelConfig.decoder` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import implicit
from detection.decoder.layer import LayerConfig
from detection.decoder.movement import Settled
from detection.decoder.sparse_rcnn import SparseRCNNLayerConfig

Solver = implicit.Naive | implicit.Anderson | implicit.Broyden
Gradient = (
    implicit.RAG
    | implicit.JFB
    | implicit.Neumann
    | implicit.Phantom
    | implicit.Implicit
    | implicit.BPTT
)


@dataclass(frozen=True)
class BackboneConfig:
    """The image backbone.

    Args:
        name: ``resnet18``, ``resnet50``, ``resnet101``, ``swin_s``, or ``small`` (for CPUs).
        pretrained: start from torchvision's ImageNet weights (needs a network, once).
        weights: a ``.safetensors`` file to start from instead, with the backbone's state dict.
        frozen_stages: how many stages, counted after the stem, get no gradient (ResNet only;
            the stem is frozen with the first).
    """

    name: Literal["resnet18", "resnet50", "resnet101", "swin_s", "small"] = "resnet50"
    pretrained: bool = True
    weights: str = ""
    frozen_stages: int = 1


@dataclass(frozen=True)
class NeckConfig:
    """The channel mapper: one convolution per level, then one GroupNorm for all levels.

    Args:
        kernel_size: 1 (AdaMixer, and the parameter counts of the paper) or 3 (published code).
        activation: a ReLU between convolution and norm (published code).
    """

    kernel_size: Literal[1, 3] = 1
    activation: bool = False


@dataclass(frozen=True)
class StackedConfig:
    """AdaMixer: ``layers`` refinement layers, each with weights of its own (paper, Fig. 1a)."""

    layers: int = 6

    def __post_init__(self) -> None:
        _positive("decoder.layers", self.layers)


@dataclass(frozen=True)
class RecurrentConfig:
    """RNNDet: an initialisation layer and one tied refinement layer, trained by BPTT (Fig. 1b).

    Args:
        steps: layer calls in all, the initialisation layer's included (``NF`` of Table 2).
        initial_points: sampling points per group of the initialisation layer; by default as
            many as of the refinement layer.
    """

    steps: int = 6
    initial_points: int | None = None

    def __post_init__(self) -> None:
        _positive("decoder.steps", self.steps)
        _positive("decoder.initial_points", self.initial_points)


@dataclass(frozen=True)
class PerturbationConfig:
    """Refinement-aware perturbation of the path (paper, Eq. 13–16, Table 4e–g).

    Args:
        content: ``σ_q``, noise on the content as a fraction of its norm; 0 for none.
        position: ``σ_p``, noise on the box corners in pixels of the input image; 0 for none.
        probability: of each of the two, at every step.
        entry: zero-step, one-step or multi-step.
    """

    content: float = 0.1
    position: float = 25.0
    probability: float = 0.2
    entry: Literal["zero-step", "one-step", "multi-step"] = "multi-step"


MOST_STEPS = 25
"""Of the paper's inference: as many refinements as ``steps="auto"`` takes at most."""


@dataclass(frozen=True)
class EquilibriumConfig:
    """DEQDet: an initialisation layer, and the fixed point of the refinement layer (Fig. 1c).

    Args:
        train_steps: ``T`` of the path in training.
        steps: solver steps at inference; ``"auto"`` refines each image until its detections have
            `settled`, which says how often at least, with 25 steps at most.
        settled: when that is.
        initial: whether the initialisation layer has weights of its own, or is the refinement
            layer itself (first row of Table 4a).
        initial_points: sampling points per group of an initialisation layer of its own; by
            default as many as of the refinement layer.
        extra_supervision: ``h``, refinements supervised directly on top of the initialisation
            layer (Table 4b).
        multiples: ``m`` of the supervision positions ``Ω = {1, C, …, mC, T}`` (Eq. 12).
        spacing: ``C`` of the supervision positions.
        gradient: at each supervised position.
        solver: walks the path in training and solves at inference.
        eval_solver: solves at inference instead, if given.
        tolerance: relative residual at which an image is done at inference, before its ``steps``
            have been taken; by default all are taken.
        perturbation: of the training path.
    """

    train_steps: int = 20
    steps: int | Literal["auto"] = "auto"
    settled: Settled = field(default_factory=Settled)
    initial: Literal["own", "shared"] = "own"
    initial_points: int | None = None
    extra_supervision: int = 2
    multiples: int = 4
    spacing: int = 3
    gradient: Gradient = implicit.RAG(2)
    solver: Solver = implicit.Naive()
    eval_solver: Solver | None = None
    tolerance: float | None = None
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)

    def __post_init__(self) -> None:
        _positive("decoder.train_steps", self.train_steps)
        _positive("decoder.steps", self.most_steps)
        _positive("decoder.initial_points", self.initial_points)
        _positive("decoder.extra_supervision", self.extra_supervision, least=0)
        if self.initial == "shared" and self.initial_points is not None:
            raise ValueError(
                "decoder.initial_points: there is no initialisation layer to have them "
                "(decoder.initial='shared')."
            )
        _ = self.positions, self.eval_stop

    @property
    def most_steps(self) -> int:
        """Solver steps at inference, at most."""
        return MOST_STEPS if self.steps == "auto" else self.steps

    @property
    def fixed_stop(self) -> implicit.Steps:
        """As many steps as inference takes at most, whatever comes of them."""
        return implicit.Steps(self.most_steps)

    @property
    def eval_stop(self) -> implicit.Steps | implicit.Tolerance:
        """When refinement ends at inference, whatever the detections."""
        if self.tolerance is None:
            return self.fixed_stop
        return implicit.Tolerance(rtol=self.tolerance, atol=0.0, max_steps=self.most_steps)

    @property
    def positions(self) -> tuple[int, ...]:
        """The supervision positions ``Ω``."""
        return implicit.positions(m=self.multiples, C=self.spacing, T=self.train_steps)


DecoderConfig = EquilibriumConfig | RecurrentConfig | StackedConfig
AnyLayerConfig = LayerConfig | SparseRCNNLayerConfig


@dataclass(frozen=True)
class ModelConfig:
    """A whole detector.

    Args:
        backbone: image features.
        neck: brings them to ``layer.feature_channels``.
        layer: the refinement layer, of AdaMixer or of Sparse R-CNN; ``layer.num_classes`` is the
            number of classes of the data.
        decoder: how that layer is iterated, which is what makes it DEQDet, RNNDet or AdaMixer.
        num_queries: object queries per image.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    neck: NeckConfig = field(default_factory=NeckConfig)
    layer: AnyLayerConfig = field(default_factory=LayerConfig)
    decoder: DecoderConfig = field(default_factory=EquilibriumConfig)
    num_queries: int = 100

    def __post_init__(self) -> None:
        _positive("num_queries", self.num_queries)
        points = getattr(self.decoder, "initial_points", None)
        if points is not None and not isinstance(self.layer, LayerConfig):
            raise ValueError(
                f"decoder.initial_points={points}: the layer of Sparse R-CNN has no sampling "
                "points. Leave it out."
            )


def _positive(name: str, value: int | None, least: int = 1) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name}={value}: must be at least {least}.")
