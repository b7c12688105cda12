"""Noise on object queries, for refinement-aware perturbation (paper, §3.3).

Content and position mean different things, so they get different noise: the content vector is
mixed with Gaussian noise of its own length (Eq. 16); the box is moved by its corners, in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import implicit
from detection.boxes import perturb_boxes
from detection.decoder.queries import Queries
from implicit.perturbation import RandomSource


@dataclass(frozen=True)
class ContentNoise:
    """`implicit.NormScaledNoise` on the content of the queries, with ``σ_q = sigma``."""

    sigma: float

    def __call__(self, queries: Queries, generator: RandomSource | None = None) -> Queries:
        noise = implicit.NormScaledNoise(self.sigma)
        return queries._replace(content=noise(queries.content, generator))


@dataclass(frozen=True)
class BoxNoise:
    """Gaussian noise of ``sigma`` pixels on each corner coordinate.

    The corners may change places: the position is encoded from the absolute side lengths, while
    the noisy corners themselves stay in ``boxes``, where the attention bias sees them.
    """

    sigma: float

    def __call__(self, queries: Queries, generator: RandomSource | None = None) -> Queries:
        noise = self.sigma * implicit.standard_normal(queries.boxes, generator)
        position, boxes = perturb_boxes(queries.boxes, noise)
        return queries._replace(position=position, boxes=boxes)
