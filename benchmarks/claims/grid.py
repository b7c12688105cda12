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
from benchmarks.claims.paper import PAPER, Printed


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        label: as the paper writes it.
        arm: what is trained.
        printed: what the paper prints of it, in this table or another; `None` where it has none.
        refinements: at which the trained detector is read; as many as its recipe says by default.
    """

    label: str
    arm: Arm
    printed: Printed | None = None
    refinements: int | None = None

    @property
    def paper(self) -> float | None:
        """The paper's AP in per cent."""
        return None if self.printed is None else self.printed.figure("AP")


@dataclass(frozen=True)
class Comparison:
    """Rows that stand beside each other, equal in all but the change."""

    name: str
    title: str
    rows: tuple[Row, ...]


def _row(table: str, label: str, arm: Arm, refinements: int | None = None) -> Row:
    """A row that the paper has too."""
    return Row(label, arm, PAPER[table][label], refinements)


def _sigma_rows(table: str, *rows: tuple[float, int]) -> tuple[Row, ...]:
    return tuple(_row(table, f"{q:g} / {p}", SIGMA[q, p]) for q, p in rows)


COMPARISONS = (
    Comparison(
        "2",
        "AdaMixer, RNNDet and DEQDet",
        (
            _row("2", "AdaMixer, NF = 6", ADAMIXER),
            _row("2", "AdaMixer†, NF = 6", ADAMIXER_64),
            *(_row("2", f"RNNDet, NF = {n}", RNNDET[n]) for n in (6, 8, 12, 16, 20)),
            *(_row("2", f"DEQDet, NF = {n}", DEQDET_AS_RNNDET, n) for n in (6, 8, 16, 25)),
            *(_row("2", f"DEQDet†, NF = {n}", DEQDET_64, n) for n in (6, 25)),
        ),
    ),
    Comparison(
        "4a",
        "sampling points of the initialisation layer",
        (_row("4a", "/", NO_INIT), _row("4a", "32", INIT_32), _row("4a", "64", INIT_64)),
    ),
    Comparison(
        "4b",
        "extra supervised layers h",
        tuple(_row("4b", str(h), EXTRA[h]) for h in (0, 1, 2)),
    ),
    Comparison(
        "4c",
        "the gradient",
        (
            _row("4c", "RAG(1) = JFB", RAG[1]),
            *(_row("4c", f"RAG({k})", RAG[k]) for k in (2, 3, 4)),
            Row("Neumann(2)", NEUMANN),
            Row("Phantom(2, 0.5)", PHANTOM),
            Row("Implicit()", IMPLICIT),
            Row("BPTT()", BPTT),
            Row("RAG(1) = JFB, no perturbation", QUIET_JFB),
            Row("RAG(2), no perturbation", QUIET, PAPER["4e"]["/"]),
        ),
    ),
    Comparison(
        "4d",
        "supervision positions Ω",
        tuple(
            _row("4d", f"m = {m}, C = {c}", POSITIONS[m, c])
            for m, c in ((4, 3), (4, 4), (3, 3), (5, 3))
        ),
    ),
    Comparison(
        "4e",
        "where the perturbation enters",
        (
            _row("4e", "/", QUIET),
            *(_row("4e", entry, ENTRY[entry]) for entry in ("zero-step", "one-step", "multi-step")),
        ),
    ),
    Comparison(
        "4f",
        "one noise, σ_q / σ_p",
        (
            _row("4f", "0 / 0", QUIET),
            *_sigma_rows("4f", (0, 25), (0, 50), (0.1, 0), (0.2, 0)),
        ),
    ),
    Comparison(
        "4g",
        "both noises, σ_q / σ_p",
        _sigma_rows("4g", (0.1, 25), (0.1, 50), (0.2, 25), (0.2, 50)),
    ),
    Comparison(
        "4h", "T_train", tuple(_row("4h", str(steps), STEPS[steps]) for steps in (15, 20, 25))
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
