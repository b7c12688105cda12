"""The arms: detectors that are compared, each with one change.

An arm is a base detector with one change.  Changes are told in the paper's own units and brought to
the size of a base recipe by one rule: pixels are of images of 800 px, sampling points of layers
with 32.  At the paper's size the rule changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import implicit
from detection.decoder.layer import LayerConfig
from detection.models.config import PerturbationConfig, RecurrentConfig
from detection.training.recipe import Recipe

Base = Literal["adamixer", "rnndet", "deqdet"]
Bases = Mapping[str, Recipe]

PAPER_SIDE = 800
"""Short side of the paper's images, in whose pixels the position noise is told."""
PAPER_POINTS = 32
"""Sampling points of the paper's refinement layer."""


@dataclass(frozen=True)
class Arm:
    """One detector of the comparison.

    Args:
        name: on the command line and in the results.
        label: in tables.
        base: what it begins from.
        change: the one thing that differs, by name and value in the paper's units; of the arm
            ``of``, where there is one, or else of the base.
        of: the arm that is changed.
    """

    name: str
    label: str
    base: Base
    change: tuple[str, Any] | None = None
    of: Arm | None = None

    def recipe(self, bases: Bases) -> Recipe:
        """The arm's recipe, at the size of the bases."""
        made = bases[self.base] if self.of is None else self.of.recipe(bases)
        if self.change is None:
            return made
        what, value = self.change
        layer, model = made.model.layer, made.model
        assert isinstance(layer, LayerConfig)
        if what == "points":
            layer = replace(layer, points=_points(value, bases))
            return replace(made, model=replace(model, layer=layer))
        fields = _fields(what, value, bases)
        return replace(made, model=replace(model, decoder=replace(model.decoder, **fields)))


def _fields(what: str, value: Any, bases: Bases) -> dict[str, Any]:
    """A change as fields of the decoder."""
    if what == "initialisation":
        if value == "shared":
            return {"initial": "shared", "initial_points": None}
        if value == "as RNNDet":
            recurrent = bases["rnndet"].model.decoder
            assert isinstance(recurrent, RecurrentConfig)
            return {"initial_points": recurrent.initial_points or _points(PAPER_POINTS, bases)}
        return {"initial_points": _points(value, bases)}
    if what == "perturbation":
        side = min(bases["deqdet"].augmentation.short_sides)
        return {"perturbation": replace(value, position=value.position * side / PAPER_SIDE)}
    if what == "positions":
        return dict(zip(("multiples", "spacing"), value, strict=True))
    return {what: value}


def _points(of_the_paper: int, bases: Bases) -> int:
    layer = bases["deqdet"].model.layer
    assert isinstance(layer, LayerConfig)
    return of_the_paper * layer.points // PAPER_POINTS


def noise(content: float, position: float, entry: Any = "multi-step") -> tuple[str, Any]:
    """A perturbation, its pixels those of the paper."""
    return "perturbation", PerturbationConfig(content, position, entry=entry)


ADAMIXER = Arm("adamixer", "AdaMixer", "adamixer")
ADAMIXER_64 = Arm("adamixer-64", "AdaMixer†", "adamixer", ("points", 64))
RNNDET = {
    steps: Arm(f"rnndet-{steps}", f"RNNDet, T = {steps}", "rnndet", ("steps", steps))
    for steps in (6, 8, 12, 16, 20)
}
DEQDET = Arm("deqdet", "DEQDet", "deqdet")
DEQDET_AS_RNNDET = Arm(
    "deqdet-as-rnndet", "DEQDet, layers of RNNDet", "deqdet", ("initialisation", "as RNNDet")
)
DEQDET_64 = Arm("deqdet-64", "DEQDet†", "deqdet", ("points", 64))
QUIET = Arm("quiet", "DEQDet without perturbation", "deqdet", noise(0, 0))
QUIET_JFB = Arm(
    "quiet-jfb", "DEQDet without perturbation, JFB", "deqdet", ("gradient", implicit.RAG(1)), QUIET
)


def _deqdet(name: str, label: str, what: str, value: Any) -> Arm:
    return Arm(name, f"DEQDet, {label}", "deqdet", (what, value))


NO_INIT = _deqdet("init-none", "no initialisation layer", "initialisation", "shared")
INIT_32 = _deqdet("init-32", "32 points at first", "initialisation", 32)
INIT_64 = _deqdet("init-64", "64 points at first", "initialisation", 64)
EXTRA = {h: _deqdet(f"extra-{h}", f"h = {h}", "extra_supervision", h) for h in (0, 1, 2)}
RAG = {k: _deqdet(f"rag-{k}", f"RAG({k})", "gradient", implicit.RAG(k)) for k in (1, 2, 3, 4)}
NEUMANN = _deqdet("neumann-2", "Neumann(2)", "gradient", implicit.Neumann(2))
PHANTOM = _deqdet("phantom-2", "Phantom(2, 0.5)", "gradient", implicit.Phantom(2, 0.5))
IMPLICIT = _deqdet("implicit", "Implicit()", "gradient", implicit.Implicit())
BPTT = _deqdet("bptt", "BPTT()", "gradient", implicit.BPTT())
POSITIONS = {
    (m, c): _deqdet(f"omega-{m}-{c}", f"m = {m}, C = {c}", "positions", (m, c))
    for m, c in ((4, 3), (4, 4), (3, 3), (5, 3))
}
ENTRY = {
    entry: _deqdet(entry, entry, *noise(0.1, 25, entry))
    for entry in ("zero-step", "one-step", "multi-step")
}
SIGMA = {
    (q, p): _deqdet(f"noise-{q:g}-{p}", f"σ_q = {q:g}, σ_p = {p}", *noise(q, p))
    for q, p in ((0, 25), (0, 50), (0.1, 0), (0.2, 0), (0.1, 25), (0.1, 50), (0.2, 25), (0.2, 50))
}
STEPS = {t: _deqdet(f"train-{t}", f"T_train = {t}", "train_steps", t) for t in (15, 20, 25)}
