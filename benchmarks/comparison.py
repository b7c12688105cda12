"""The tables of ``docs/comparison.md``, from what the benchmarks of `implicit` found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import put, table

NORMS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
"""Contractions that the page shows, of those that were measured."""


def robustness(found: dict[str, Any]) -> Iterator[Sequence[str]]:
    """Problems solved, and evaluations on those that all but the naive iteration solve."""
    problems = {run["problem"] for run in found["runs"]}
    common = len(found["common"])
    yield (
        "solver",
        f"solved, of {len(problems)}",
        f"evaluations on the {common} that all but Naive solve",
    )
    for solver, count in found["solved"].items():
        on_common = "–" if solver == "Naive" else found["evaluations_on_common"][solver]
        yield solver, str(count), str(on_common)


def mixed_batches(found: list[dict[str, Any]]) -> Iterator[Sequence[str]]:
    """Rows evaluated over those of each sample alone: a column for each batch."""
    batches = list(dict.fromkeys(row["batch"] for row in found))
    yield "solver", *batches
    ratios = {(row["solver"], row["batch"]): f"{row['ratio']:.2f}" for row in found}
    for solver in dict.fromkeys(row["solver"] for row in found):
        yield solver, *(ratios[solver, batch] for batch in batches)


def gradient_error(found: dict[str, Any]) -> Iterator[Sequence[str]]:
    """Relative errors: a column for each contraction."""
    yield "gradient", *(f"{norm:g}" for norm in NORMS)
    errors = {(row["gradient"], row["contraction"]): row["error"] for row in found["modes"]}
    for gradient in dict.fromkeys(row["gradient"] for row in found["modes"]):
        yield gradient, *(f"{errors[gradient, norm]:.1e}" for norm in NORMS)


def overhead(found: list[dict[str, Any]]) -> Iterator[Sequence[str]]:
    """Time, operations and copies beside torchdeq's."""
    yield (
        "solver",
        "(B, D)",
        "time over torchdeq's, `Tolerance`",
        "`Steps`",
        "operations (torchdeq)",
        "copies of the state (torchdeq)",
    )
    runs = {(row["solver"], row["batch"], row["dim"], row["stop"]): row for row in found}
    for solver, batch, dim in dict.fromkeys(key[:3] for key in runs):
        ours, fixed, peer = (
            runs[solver, batch, dim, stop] for stop in ("Tolerance", "Steps", "torchdeq")
        )
        yield (
            solver,
            f"({batch}, {dim})",
            f"{ours['ratio']:.2f}",
            f"{fixed['ratio']:.2f}",
            f"{ours['operations']:.0f} ({peer['operations']:.0f})",
            f"{ours['copies']:.1f} ({peer['copies']:.1f})",
        )


TABLES = {
    "robustness": robustness,
    "mixed_batches": mixed_batches,
    "gradient_error": gradient_error,
    "overhead": overhead,
}


def written(text: str, folder: Path) -> str:
    """The page as the results in ``folder`` have it."""
    for name, rows in TABLES.items():
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["results"]
        text = put(text, name, _shown(list(rows(found))))
    return text


def _shown(rows: Sequence[Sequence[str]]) -> str:
    numbers = [i for i, cell in enumerate(rows[1]) if i and (cell == "–" or cell[0].isdigit())]
    return table(rows, right=numbers)
