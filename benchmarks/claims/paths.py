"""A batch refined step by step, so that every way to end it can be read afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

import implicit
from detection.data.types import Batch
from detection.decoder.queries import Queries, QueryLayer
from detection.models.decoders import EquilibriumDecoder, Output, RecurrentDecoder
from detection.models.detector import Detector

ANDERSON = implicit.Anderson(memory=5)
UNREFINED = -1
"""Place of what the first layer says of its own output."""


class Path:
    """A batch refined step by step.

    Attributes:
        steps: how many refinements it is long.
        states: before the first refinement, and after each; one more, from which the residual of
            the last is known.
        residual: ``(T + 1, B)`` relative residual of every state, as a whole.
        length: ``(T + 1, B)`` the residual itself.
    """

    def __init__(self, model: Detector, batch: Batch, solver: implicit.Solver, steps: int) -> None:
        first, layer = layers(model)
        features, queries = model.encode(batch.images, batch.sizes)
        start = first(queries, features)
        lengths: list[Tensor] = []

        def refine(state: Queries, features: Sequence[Tensor]) -> Queries:
            after = layer(state, features)
            moved = [(a - b).flatten(1) for a, b in zip(after, state, strict=True)]
            lengths.append(torch.cat(moved, dim=1).norm(dim=1))
            return after

        solution = implicit.fixed_point(
            refine,
            start,
            solver=solver,
            stop=implicit.Steps(steps + 1),
            gradient=implicit.JFB(),
            args=(features,),
            path=range(1, steps + 2),
            trace=True,
        )
        assert solution.trace is not None
        self.model, self.batch, self.steps = model, batch, steps
        self.states: list[Queries] = [start, *solution.path]
        self.residual = solution.trace[: steps + 1]
        self.length = torch.stack(lengths)

    def fixed(self, steps: int) -> list[int]:
        """The output of each image after so many steps; the first layer's own after none."""
        return [steps or UNREFINED] * len(self.batch)

    def best(self, steps: int) -> list[int]:
        """The state of each image with the least residual among the first so many."""
        lowest: list[int] = self.length[:steps].nan_to_num(torch.inf).argmin(0).tolist()
        return lowest

    def within(self, tolerance: float) -> list[int]:
        """The first state of each image whose residual is within tolerance, or the last."""
        return self._first(self.residual <= tolerance)

    def within_or_best(self, tolerance: float) -> list[int]:
        """The first state of each image whose residual is within tolerance, or the best of all."""
        best = self.best(self.steps + 1)
        return [
            first if reached else other
            for first, reached, other in zip(
                self.within(tolerance),
                (self.residual <= tolerance).any(0).tolist(),
                best,
                strict=True,
            )
        ]

    def settled(self) -> list[int]:
        """The state at which ``steps="auto"`` ends."""
        decoder = self.model.decoder
        assert isinstance(decoder, EquilibriumDecoder)
        settled, classify = decoder.config.settled, decoder.refinement.classify
        moved = [settled.movement(a, b, classify) for a, b in pairwise(self.states)]
        reached = torch.stack(moved) <= 1
        reached[: settled.least_steps] = False
        return self._first(reached)

    def _first(self, reached: Tensor) -> list[int]:
        """The first state of each image of which it is true, or the last."""
        first = torch.where(reached.any(0), reached.int().argmax(0), self.steps)
        found: list[int] = first.tolist()
        return found

    def changes(self) -> tuple[Tensor, Tensor]:
        """``(T, B)`` change of the contents, over their norm, and of the boxes in pixels."""
        found = [distance(a, b) for a, b in pairwise(self.states[: self.steps + 1])]
        contents, boxes = zip(*found, strict=True)
        return torch.stack(contents), torch.stack(boxes)

    def outputs(self) -> list[Output]:
        """What each state says, and last what the first layer says of its own output.

        The others are read by the layer that is refined with, as the decoders do.
        """
        first, layer = layers(self.model)
        states = self.states[: self.steps + 1]
        read = [Output(layer.classify(state.content), state.boxes) for state in states]
        start = self.states[0]
        return [*read, Output(first.classify(start.content), start.boxes)]


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


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")
