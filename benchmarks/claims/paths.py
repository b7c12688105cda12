"""A batch refined step by step, so that every way to end it can be read afterwards."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

import implicit
from detection.data.types import Batch
from detection.decoder.queries import Queries, QueryLayer
from detection.models.decoders import EquilibriumDecoder, Output, RecurrentDecoder
from detection.models.detector import Detector

ANDERSON = implicit.Anderson(memory=5)


class Path:
    """A batch refined step by step.

    Attributes:
        states: before the first refinement, and after each.
        residual: ``(T, B)`` relative residual of every state but the last, of the whole state.
    """

    def __init__(self, model: Detector, batch: Batch, solver: implicit.Solver, steps: int) -> None:
        first, layer = layers(model)
        features, queries = model.encode(batch.images, batch.sizes)
        start = first(queries, features)
        solution = implicit.fixed_point(
            layer,
            start,
            solver=solver,
            stop=implicit.Steps(steps),
            gradient=implicit.JFB(),
            args=(features,),
            path=range(1, steps + 1),
            trace=True,
        )
        assert solution.trace is not None
        self.model, self.batch = model, batch
        self.states: list[Queries] = [start, *solution.path]
        self.residual = solution.trace[:steps]

    def fixed(self, steps: int) -> list[int]:
        """The state that each image has after so many steps."""
        return [steps] * len(self.batch)

    def best(self, steps: int) -> list[int]:
        """The state of each image with the least residual among the first so many."""
        lowest: list[int] = self.residual[:steps].nan_to_num(torch.inf).argmin(0).tolist()
        return lowest

    def within(self, tolerance: float) -> list[int]:
        """The first state of each image whose residual is within tolerance."""
        return _first(self.residual <= tolerance)

    def settled(self) -> list[int]:
        """The state at which ``steps="auto"`` ends."""
        decoder = self.model.decoder
        assert isinstance(decoder, EquilibriumDecoder)
        settled, classify = decoder.config.settled, decoder.refinement.classify
        moved = [settled.movement(a, b, classify) for a, b in pairwise(self.states)]
        return _first(torch.stack(moved) <= 1)

    def changes(self) -> tuple[Tensor, Tensor]:
        """``(T, B)`` change of the contents, over their norm, and of the boxes in pixels."""
        found = [distance(a, b) for a, b in pairwise(self.states)]
        contents, boxes = zip(*found, strict=True)
        return torch.stack(contents), torch.stack(boxes)

    def outputs(self) -> list[Output]:
        """What each state says."""
        first, layer = layers(self.model)
        read = [first, *[layer] * (len(self.states) - 1)]
        return [
            Output(layer.classify(state.content), state.boxes)
            for layer, state in zip(read, self.states, strict=True)
        ]


def layers(model: Detector) -> tuple[QueryLayer, QueryLayer]:
    """The layer that is called first, and the one that is called from then on."""
    decoder = model.decoder
    assert isinstance(decoder, (EquilibriumDecoder, RecurrentDecoder))
    layer = decoder.refinement
    assert isinstance(layer, QueryLayer)
    return decoder.first, layer


def distance(a: Queries, b: Queries) -> tuple[Tensor, Tensor]:
    """``(B,)`` of two states: of contents relative to ``b``, of boxes in pixels (mean of sides)."""
    content = (a.content - b.content).flatten(1).norm(dim=1) / b.content.flatten(1).norm(dim=1)
    return content, (a.boxes - b.boxes).abs().mean(dim=(1, 2))


def _first(reached: Tensor) -> list[int]:
    """The first step of each image at which it is reached, or the last state of all."""
    first: list[int] = torch.where(reached.any(0), reached.int().argmax(0), len(reached)).tolist()
    return first


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")
