"""What is compared: the rows of the paper's Tables 2 and 4, and rows that it lacks."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.claims.arms import (
    ADAMIXER,
    ADAMIXER_64,
    BPTT,
    DEQDET,
    DEQDET_64,
    DEQDET_AS_RNNDET,
    ENTRY,
    EXTRA,
    IMPLICIT,
    INIT_32,
    INIT_64,
    NEUMANN,
    NO_INIT,
    PHANTOM,
    POSITIONS,
    QUIET,
    QUIET_JFB,
    RAG,
    RNNDET,
    SIGMA,
    STEPS,
    Arm,
)


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


def arms() -> dict[str, Arm]:
    """Every arm by its name."""
    found = {row.arm.name: row.arm for comparison in COMPARISONS for row in comparison.rows}
    return {DEQDET.name: DEQDET, **found}
