"""What is compared: the rows of the paper's Tables 2 and 4, arms the paper lacks, and its claims.

An arm is a base detector with one change.  Changes are told in the paper's own units and brought to
the size of a base recipe by one rule: pixels are of images of 800 px, sampling points of layers
with 32.  At the paper's size the rule changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

import implicit
from detection.decoder.layer import LayerConfig
from detection.models.config import EquilibriumConfig, PerturbationConfig, RecurrentConfig
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


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        label: as the paper writes it.
        arm: what is trained.
        paper: the paper's AP in per cent; `None` where it has none.
        refinements: at which the trained detector is read; as many as its recipe says by default.
    """

    label: str
    arm: Arm
    paper: float | None = None
    refinements: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Rows that stand beside each other, equal in all but the change."""

    name: str
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Claim:
    """A statement, and the difference that decides it.

    Args:
        name: on the page.
        statement: in words.
        better, worse: rows whose AP is compared, seed by seed.
        least: how many AP the first has to be ahead at least.
        source: where the paper says so; empty where it does not.
    """

    name: str
    statement: str
    better: Row
    worse: Row
    least: float
    source: str

    @property
    def paper(self) -> float | None:
        """The paper's difference in AP."""
        if self.better.paper is None or self.worse.paper is None:
            return None
        return round(self.better.paper - self.worse.paper, 1)


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


def _sigma_rows(*rows: tuple[float, int, float]) -> tuple[Row, ...]:
    return tuple(Row(f"{q:g} / {p}", SIGMA[q, p], paper) for q, p, paper in rows)


COMPARISONS = (
    Comparison(
        "2",
        "AdaMixer, RNNDet and DEQDet",
        (
            Row("AdaMixer, NF = 6", ADAMIXER, 42.7),
            Row("AdaMixer†, NF = 6", ADAMIXER_64, 42.7),
            *(
                Row(f"RNNDet, NF = {steps}", RNNDET[steps], paper)
                for steps, paper in ((6, 43.4), (8, 44.2), (12, 44.2), (16, 43.8), (20, 43.7))
            ),
            *(
                Row(f"DEQDet, NF = {steps}", DEQDET_AS_RNNDET, paper, refinements=steps)
                for steps, paper in ((6, 44.3), (8, 44.9), (16, 45.2), (25, 45.3))
            ),
            Row("DEQDet†, NF = 6", DEQDET_64, 45.7, refinements=6),
            Row("DEQDet†, NF = 25", DEQDET_64, 46.0, refinements=25),
        ),
    ),
    Comparison(
        "4a",
        "sampling points of the initialisation layer",
        (Row("/", NO_INIT, 45.2), Row("32", INIT_32, 45.3), Row("64", INIT_64, 45.5)),
    ),
    Comparison(
        "4b",
        "extra supervised layers h",
        tuple(Row(str(h), EXTRA[h], ap) for h, ap in ((0, 44.7), (1, 45.1), (2, 45.5))),
    ),
    Comparison(
        "4c",
        "the gradient",
        (
            Row("RAG(1) = JFB", RAG[1], 41.9),
            Row("RAG(2)", RAG[2], 45.5),
            Row("RAG(3)", RAG[3], 45.5),
            Row("RAG(4)", RAG[4], 45.7),
            Row("Neumann(2)", NEUMANN),
            Row("Phantom(2, 0.5)", PHANTOM),
            Row("Implicit()", IMPLICIT),
            Row("BPTT()", BPTT),
            Row("RAG(1) = JFB, no perturbation", QUIET_JFB),
            Row("RAG(2), no perturbation", QUIET, 44.3),
        ),
    ),
    Comparison(
        "4d",
        "supervision positions Ω",
        tuple(
            Row(f"m = {m}, C = {c}", POSITIONS[m, c], ap)
            for m, c, ap in ((4, 3, 45.5), (4, 4, 45.4), (3, 3, 45.1), (5, 3, 45.2))
        ),
    ),
    Comparison(
        "4e",
        "where the perturbation enters",
        (
            Row("/", QUIET, 44.3),
            Row("zero-step", ENTRY["zero-step"], 44.9),
            Row("one-step", ENTRY["one-step"], 45.1),
            Row("multi-step", ENTRY["multi-step"], 45.5),
        ),
    ),
    Comparison(
        "4f",
        "one noise, σ_q / σ_p",
        (
            Row("0 / 0", QUIET, 44.3),
            *_sigma_rows((0, 25, 45.4), (0, 50, 45.5), (0.1, 0, 45.0), (0.2, 0, 45.2)),
        ),
    ),
    Comparison(
        "4g",
        "both noises, σ_q / σ_p",
        _sigma_rows((0.1, 25, 45.5), (0.1, 50, 45.5), (0.2, 25, 45.2), (0.2, 50, 45.2)),
    ),
    Comparison(
        "4h",
        "T_train",
        tuple(Row(str(t), STEPS[t], ap) for t, ap in ((15, 45.1), (20, 45.5), (25, 45.3))),
    ),
)
"""As the paper numbers them; the gradients without a figure are those that it lacks."""


def row(comparison: str, label: str) -> Row:
    """A row by the name of its comparison and its label."""
    (found,) = (c for c in COMPARISONS if c.name == comparison)
    (wanted,) = (row for row in found.rows if row.label == label)
    return wanted


def _claim(
    name: str, statement: str, table: str, better: str, worse: str, least: float = 0.0
) -> Claim:
    better_row, worse_row = row(table, better), row(table, worse)
    known = better_row.paper is not None and worse_row.paper is not None
    source = f"Table {table}" if known else ""
    return Claim(name, statement, better_row, worse_row, least, source)


CLAIMS = (
    _claim(
        "rag",
        "RAG(2) beats JFB by at least 1 AP",
        "4c",
        "RAG(2)",
        "RAG(1) = JFB",
        1.0,
    ),
    _claim(
        "rag-quiet",
        "RAG(2) beats JFB by at least 1 AP, both without perturbation",
        "4c",
        "RAG(2), no perturbation",
        "RAG(1) = JFB, no perturbation",
        1.0,
    ),
    _claim(
        "rap",
        "Multi-step perturbation brings at least 0.5 AP",
        "4e",
        "multi-step",
        "/",
        0.5,
    ),
    _claim(
        "deqdet-rnndet",
        "DEQDet is ahead of RNNDet with T = 6",
        "2",
        "DEQDet, NF = 25",
        "RNNDet, NF = 6",
    ),
    _claim(
        "rnndet-adamixer",
        "RNNDet with T = 6 is ahead of AdaMixer",
        "2",
        "RNNDet, NF = 6",
        "AdaMixer, NF = 6",
    ),
    _claim(
        "deqdet-adamixer-6",
        "DEQDet with six refinements is ahead of AdaMixer",
        "2",
        "DEQDet, NF = 6",
        "AdaMixer, NF = 6",
    ),
    _claim(
        "more-refinements",
        "DEQDet is better with 25 refinements than with 6",
        "2",
        "DEQDet, NF = 25",
        "DEQDet, NF = 6",
    ),
    _claim(
        "rnndet-depth",
        "RNNDet with T = 20 falls behind T = 12",
        "2",
        "RNNDet, NF = 12",
        "RNNDet, NF = 20",
    ),
    _claim("init", "64 points in the initialisation layer beat none of its own", "4a", "64", "/"),
    _claim("extra", "Two extra supervised layers beat none", "4b", "2", "0"),
    _claim(
        "omega",
        "Positions with m = 4, C = 3 beat m = 3, C = 3",
        "4d",
        "m = 4, C = 3",
        "m = 3, C = 3",
    ),
    _claim("rap-zero", "Zero-step noise helps", "4e", "zero-step", "/"),
    _claim("rap-multi", "Multi-step noise beats one-step noise", "4e", "multi-step", "one-step"),
    _claim("noise-position", "Noise on positions alone helps", "4f", "0 / 25", "0 / 0"),
    _claim("noise-content", "Noise on contents alone helps", "4f", "0.1 / 0", "0 / 0"),
    _claim("noise-much", "Both noises at their largest are worse", "4g", "0.1 / 25", "0.2 / 50"),
    _claim("train-steps", "Training with T = 20 beats T = 15", "4h", "20", "15"),
    _claim(
        "neumann", "Neumann(2) loses at most 0.5 AP to RAG(2)", "4c", "Neumann(2)", "RAG(2)", -0.5
    ),
    _claim("bptt", "RAG(2) loses at most 0.5 AP to BPTT", "4c", "RAG(2)", "BPTT()", -0.5),
)


def arms() -> dict[str, Arm]:
    """Every arm by its name."""
    found = {row.arm.name: row.arm for comparison in COMPARISONS for row in comparison.rows}
    return {DEQDET.name: DEQDET, **found}


def nearest(kind: str, name: str, known: list[str]) -> str:
    """The sentence that refuses an unknown name."""
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no {kind} {name!r}.{hint} Known: {', '.join(known)}."


def is_equilibrium(recipe: Recipe) -> bool:
    """Whether a recipe's detector solves for a fixed point."""
    return isinstance(recipe.model.decoder, EquilibriumConfig)
