"""What was found, as tables: for the terminal, and as Markdown for the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from benchmarks.claims.grid import COMPARISONS, Comparison, Row, arms
from benchmarks.claims.results import Record
from benchmarks.claims.statements import CLAIMS
from benchmarks.claims.statistics import Estimate, difference, verdict

Found = Mapping[str, Mapping[int, Record]]
"""Finished records by arm and seed."""

NONE = "–"


@dataclass(frozen=True)
class Sheet:
    """A table, and the sentence that says what it shows."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for n, heading in enumerate(self.head):
            table.add_column(heading, justify="right" if n and not _is_words(heading) else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For the page."""
        lines = [self.head, tuple("---" for _ in self.head), *self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{body}"


def _is_words(heading: str) -> bool:
    return heading in ("claim", "verdict", "source", "reason")


def sheets(found: Found) -> list[Sheet]:
    """The verdicts, and every table of the paper of which two rows were measured."""
    made = [verdicts(found), *(compared(found, comparison) for comparison in COMPARISONS)]
    return [sheet for sheet in made if sheet is not None and sheet.rows]


def ap_of(found: Found, row: Row) -> dict[int, float]:
    """AP by seed, in per cent, as a row reads it."""
    values: dict[int, float] = {}
    for seed, record in found.get(row.arm.name, {}).items():
        ap = record.ap if row.refinements is None else record.ap_at(row.refinements)
        if ap is not None:
            values[seed] = ap
    return values


def verdicts(found: Found) -> Sheet:
    """Claim by claim; those of which nothing was measured are left out."""
    rows = []
    for claim in CLAIMS:
        apart = difference(ap_of(found, claim.better), ap_of(found, claim.worse))
        if apart.count:
            said = NONE if claim.paper is None else f"{claim.paper:+.1f}"
            rows.append(
                (
                    claim.statement,
                    claim.source or NONE,
                    said,
                    _signed(apart),
                    str(apart.count),
                    verdict(apart, claim.least),
                )
            )
    head = ("claim", "source", "the paper's difference", "here", "seeds", "verdict")
    return Sheet(
        "Claims: differences in AP, paired by seed, with 95 % intervals", head, tuple(rows)
    )


def _signed(estimate: Estimate) -> str:
    text = f"{estimate.mean:+.1f}"
    return text if math.isinf(estimate.half) else f"{text} ± {estimate.half:.1f}"


def compared(found: Found, comparison: Comparison) -> Sheet | None:
    """A table of the paper, with what was measured beside its figures; `None` of a lone row.

    A row with results of another version than the newest is marked by a star.
    """
    measured = [row for row in comparison.rows if ap_of(found, row)]
    if len({row.arm for row in measured}) < 2:
        return None
    costs = comparison.name == "2"
    head = ("", "paper's AP", "AP", "AP50", "AP75", "small", "medium", "large", "seeds")
    more = ("parameters", "images/s", "training memory", "inference memory", "minutes")
    newest = max((r for by_seed in found.values() for r in by_seed.values()), key=_date).version
    rows = []
    for row in measured:
        records = list(found[row.arm.name].values())
        others = any(record.version != newest for record in records)
        cells = [
            f"{row.label} *" if others else row.label,
            NONE if row.paper is None else f"{row.paper:.1f}",
        ]
        cells.append(str(Estimate.of(list(ap_of(found, row).values()))))
        cells += [
            _figure(record_figures(record, row.refinements).get(name) for record in records)
            for name in ("AP50", "AP75", "AP_small", "AP_medium", "AP_large")
        ]
        cells.append(str(len(records)))
        rows.append((*cells, *(_costs(row, records) if costs else ())))
    title = f"Table {comparison.name}: {comparison.title}"
    return Sheet(title, (*head, *more) if costs else head, tuple(rows))


def _date(record: Record) -> str:
    return record.date


def record_figures(record: Record, refinements: int | None) -> dict[str, Any]:
    """The figures of a run in [0, 1], at its end or when read after so many refinements."""
    if refinements is None:
        return record.epochs[-1]
    points = record.inference.get("curve", ())
    wanted = ("naive", str(refinements))
    return next((dict(p) for p in points if (p["kind"], p["setting"]) == wanted), {})


def _costs(row: Row, records: Sequence[Record]) -> tuple[str, ...]:
    first = records[0]
    calls = "own" if row.refinements is None else str(row.refinements)
    rates = [record.rates[calls] for record in records if calls in record.rates]
    train, infer = (first.memory.get(name) for name in ("train", "inference"))
    return (
        f"{first.parameters / 1e6:.2f} M",
        f"{fmean(rates):.1f}" if rates else NONE,
        f"{train / 2**20:.0f} MiB" if train else NONE,
        f"{infer / 2**20:.0f} MiB" if infer else NONE,
        f"{fmean(minutes_of(record) for record in records):.1f}",
    )


def minutes_of(record: Record) -> float:
    """Of training: of the processor where one thread did it, and otherwise on the wall."""
    if record.threads == 1 and "NVIDIA" not in record.device:
        return record.training_minutes / record.step_seconds * record.step_processor_seconds
    return record.training_minutes


def _figure(values: Iterable[Any]) -> str:
    known = [100 * float(value) for value in values if value is not None]
    known = [value for value in known if not math.isnan(value)]
    return f"{fmean(known):.1f}" if known else NONE


def label(name: str) -> str:
    """What an arm is called in tables."""
    known = arms()
    return known[name].label if name in known else name


def distinct(found: Found) -> dict[str, list[Record]]:
    """The records of each run, once, under the label of its first arm; in the grid's order."""
    made: dict[str, list[Record]] = {}
    for name in arms():
        for record in found.get(name, {}).values():
            if record.arms[0] == name:
                made.setdefault(label(name), []).append(record)
    return made


def failures(records: Iterable[Record]) -> Sheet:
    """Runs without a result."""
    rows = tuple((record.arms[0], str(record.seed), record.reason) for record in records)
    return Sheet("Failed runs", ("arm", "seed", "reason"), rows)
