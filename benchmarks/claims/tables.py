"""What was found, as tables: for the terminal, and as Markdown for the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from benchmarks.claims.grid import COMPARISONS, Comparison, Row, arms
from benchmarks.claims.paper import NAMES, Costs
from benchmarks.claims.results import Record, in_order
from benchmarks.claims.statements import CLAIMS
from benchmarks.claims.statistics import (
    CONFIDENCE,
    LEAST_SEEDS,
    Estimate,
    difference,
    verdict,
)
from benchmarks.pages import table

Found = Mapping[str, Mapping[int, Record]]
"""Finished records by arm and seed."""

NONE = "–"
STARRED = "A star: not all of these runs are of the newest code and data."


@dataclass(frozen=True)
class Sheet:
    """A table, and the sentences that say how to read it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What stands beneath the table."""
        starred = any(row[0].endswith(" *") for row in self.rows) or self.title.endswith(" *")
        return " ".join((*self.notes, STARRED) if starred else self.notes)

    def rich(self) -> Table:
        """For the terminal."""
        shown = Table(
            title=self.title,
            title_justify="left",
            title_style="bold",
            caption=self.note or None,
            caption_justify="left",
        )
        for n, heading in enumerate(self.head):
            shown.add_column(heading, justify="right" if n and not _is_words(heading) else "left")
        for row in self.rows:
            shown.add_row(*row)
        return shown

    def markdown(self) -> str:
        """For the page."""
        parts = (f"**{self.title}**", table([self.head, *self.rows]), self.note)
        return "\n\n".join(part for part in parts if part)


def _is_words(heading: str) -> bool:
    return heading in ("claim", "verdict", "source", "reason", "begins with", "lowest", "highest")


def sheets(found: Found, failed: Sequence[Record] = ()) -> list[Sheet]:
    """The verdicts, and every table of the paper of which two rows were measured.

    Args:
        found: finished runs.
        failed: runs that ended without a result, which are counted beside the others.
    """
    made: list[Sheet | None] = [verdicts(found, failed)]
    for comparison in COMPARISONS:
        made.append(compared(found, comparison, failed))
        if comparison.name == "2":
            made.append(costs(found, comparison))
    return [sheet for sheet in made if sheet is not None and sheet.rows]


def ap_of(found: Found, row: Row) -> dict[int, float]:
    """AP by seed, in per cent, as a row reads it; of the runs that have one."""
    return {seed: ap for seed, ap in _read(found, row).items() if math.isfinite(ap)}


def _read(found: Found, row: Row) -> dict[int, float]:
    """As `ap_of`, with NaN of runs that ended without AP."""
    values: dict[int, float] = {}
    for seed, record in found.get(row.arm.name, {}).items():
        ap = record.ap if row.refinements is None else record.ap_at(row.refinements)
        if ap is not None:
            values[seed] = ap
    return values


def without(found: Found, failed: Iterable[Record], row: Row) -> set[int]:
    """Seeds of a row's arm that ended and have no AP: those that failed, and those without one."""
    read = _read(found, row)
    ended = set(read) | {record.seed for record in failed if row.arm.name in record.arms}
    return ended - set(ap_of(found, row))


def _seeds(count: int, lost: set[int]) -> str:
    return f"{count} ({len(lost)} more without AP)" if lost else str(count)


def verdicts(found: Found, failed: Sequence[Record] = ()) -> Sheet:
    """Claim by claim; those of which nothing was measured are left out."""
    rows, judged = [], 0
    version = newest(found)
    for claim in CLAIMS:
        both = claim.better, claim.worse
        better, worse = (ap_of(found, row) for row in both)
        apart = difference(better, worse)
        lost = set().union(*(without(found, failed, row) for row in both))
        if not apart.count and not (lost and (better or worse)):
            continue
        judged += apart.count >= LEAST_SEEDS
        pairs = set(better) & set(worse)
        records = [found[row.arm.name][seed] for row in both for seed in pairs]
        said = NONE if claim.paper is None else f"{claim.paper:+.1f}"
        rows.append(
            (
                marked(claim.statement, records, version),
                claim.source or NONE,
                said,
                _signed(apart),
                _seeds(apart.count, lost),
                verdict(apart, claim.least),
            )
        )
    head = ("claim", "source", "the paper's difference", "here", "seeds", "verdict")
    title = "Claims: differences in AP, paired by seed, with 95 % intervals"
    return Sheet(title, head, tuple(rows), _on_verdicts(judged))


def _on_verdicts(judged: int) -> tuple[str, ...]:
    """What the intervals leave out."""
    over = (
        "Intervals are over seeds alone: the images, their split and the backbone are the same in "
        "all runs."
    )
    if not judged:
        return (over, f"With fewer than {LEAST_SEEDS} seeds nothing is decided.")
    missing = (1 - CONFIDENCE) * judged
    claims = "claim is" if judged == 1 else "claims are"
    return (
        over,
        f"{judged} {claims} tested at once, without correction: by chance about {missing:.2g} of "
        "so many intervals miss the true difference.",
    )


def newest(found: Found) -> tuple[str, str] | None:
    """The version of the newest run."""
    every = in_order(record for by_seed in found.values() for record in by_seed.values())
    return every[-1].version if every else None


def marked(name: str, records: Iterable[Record], version: tuple[str, str] | None) -> str:
    """A name, with a star if not all of its runs are of that version."""
    return f"{name} *" if any(record.version != version for record in records) else name


def _signed(estimate: Estimate) -> str:
    if not estimate.count:
        return NONE
    text = f"{estimate.mean:+.1f}"
    return text if math.isinf(estimate.half) else f"{text} ± {estimate.half:.1f}"


def measured(found: Found, comparison: Comparison) -> list[Row]:
    """The rows of a table that were measured; none of a lone arm, which is no comparison."""
    rows = [row for row in comparison.rows if ap_of(found, row)]
    return rows if len({row.arm for row in rows}) > 1 else []


def compared(found: Found, comparison: Comparison, failed: Sequence[Record] = ()) -> Sheet | None:
    """A table of the paper, with what was measured beside its figures; `None` of a lone row.

    A row with results of another version than the newest is marked by a star.
    """
    if not measured(found, comparison):
        return None
    version = newest(found)
    rows = []
    for row in comparison.rows:
        values, lost = ap_of(found, row), without(found, failed, row)
        if not values and not lost:
            continue
        records = [found[row.arm.name][seed] for seed in values]
        figures = [record_figures(record, row.refinements) for record in records]
        rows.append(
            (
                marked(row.label, records, version),
                _printed(row, comparison),
                str(Estimate.of(list(values.values()))),
                *(_beside(figures, row, name) for name in NAMES[1:]),
                _seeds(len(values), lost),
            )
        )
    head = ("", "paper's AP", "AP", "AP50", "AP75", "small", "medium", "large", "seeds")
    notes: tuple[str, ...] = ("In brackets the paper's figure, of COCO.",)
    if comparison.name == "2":
        notes += (_ON_CALLS, *_on_first_layers(found, comparison))
    return Sheet(f"Table {comparison.name}: {comparison.title}", head, tuple(rows), notes)


_ON_CALLS = (
    "NF: of AdaMixer and RNNDet all calls of a layer, of DEQDet the refinements after the first "
    "layer; DEQDet's NF = 6 is so one call more than RNNDet's. In the paper both take the same "
    "time at the same NF, and so probably the same calls."
)


def _on_first_layers(found: Found, comparison: Comparison) -> tuple[str, ...]:
    """What the first layers have beside the paper's, where they have more."""
    pairs = set()
    for row in comparison.rows:
        for record in found.get(row.arm.name, {}).values():
            model = record.recipe.get("model", {})
            first = model.get("decoder", {}).get("initial_points")
            points = model.get("layer", {}).get("points")
            if first and points and first > points:
                pairs.add((first, points))
    if not pairs:
        return ()
    told = " and ".join(
        f"{first} sampling points beside {points}" for first, points in sorted(pairs)
    )
    return (
        f"The first layers of RNNDet and DEQDet have {told} of the layers that follow, and all of "
        "AdaMixer's have the same number; in the paper's rows without † all layers have 32.",
    )


def _printed(row: Row, comparison: Comparison) -> str:
    """The paper's AP, and where from, if it is another table's."""
    if row.printed is None:
        return NONE
    other = row.printed.table != comparison.name
    return f"{row.paper:.1f} (Table {row.printed.table})" if other else f"{row.paper:.1f}"


def _beside(figures: Iterable[Mapping[str, Any]], row: Row, name: str) -> str:
    """A figure here, and the paper's in brackets where it prints one."""
    said = row.printed.figure(name) if row.printed else None
    here = _figure(found.get(name) for found in figures)
    return here if said is None else f"{here} ({said:.1f})"


def record_figures(record: Record, refinements: int | None) -> dict[str, Any]:
    """The figures of a run in [0, 1], at its end or when read after so many refinements."""
    if refinements is None:
        return record.epochs[-1]
    points = record.inference.get("curve", ())
    wanted = ("naive", str(refinements))
    return next((dict(p) for p in points if (p["kind"], p["setting"]) == wanted), {})


def costs(found: Found, comparison: Comparison) -> Sheet:
    """What the rows of a table cost, beside what the paper says they do."""
    version = newest(found)
    rows = []
    for row in measured(found, comparison):
        records = list(found[row.arm.name].values())
        said = row.printed.costs if row.printed else None
        rows.append((marked(row.label, records, version), *_costs(row, records, said)))
    head = ("", "parameters", "images/s", "training memory", "inference memory", "training")
    notes = (
        "In brackets the paper's, of ResNet-50 on COCO: millions, FPS, MB, and hours.",
        "Images/s are those of the fastest seed, which other work on the machine held up least; "
        "minutes are the mean of the seeds, of the processor where one thread trained and else on "
        "the wall.",
    )
    return Sheet(f"Table {comparison.name}: what it costs", head, tuple(rows), notes)


def _costs(row: Row, records: Sequence[Record], said: Costs | None) -> tuple[str, ...]:
    first = records[0]
    calls = "own" if row.refinements is None else str(row.refinements)
    rates = [record.rates[calls] for record in records if calls in record.rates]
    minutes = Estimate.of([minutes_of(record) for record in records]).mean
    train, infer = (first.memory.get(name) for name in ("train", "inference"))
    here = (
        f"{first.parameters / 1e6:.2f} M",
        f"{max(rates):.1f}" if rates else NONE,
        f"{train / 2**20:.0f} MiB" if train else NONE,
        f"{infer / 2**20:.0f} MiB" if infer else NONE,
        f"{minutes:.1f} min" if math.isfinite(minutes) else NONE,
    )
    if said is None:
        return here
    theirs = (
        f"{said.parameters:g}",
        f"{said.rate:.1f}",
        f"{said.training:g}",
        f"{said.inference:g}",
        f"{said.hours:.1f} h",
    )
    return tuple(f"{mine} ({other})" for mine, other in zip(here, theirs, strict=True))


def minutes_of(record: Record) -> float:
    """Of training: of the processor where one thread did it, and otherwise on the wall."""
    if record.threads == 1 and record.place != "cuda" and record.step_seconds > 0:
        return record.training_minutes / record.step_seconds * record.step_processor_seconds
    return record.training_minutes


def _figure(values: Iterable[Any]) -> str:
    known = [100 * float(value) for value in values if value is not None]
    known = [value for value in known if math.isfinite(value)]
    return f"{fmean(known):.1f}" if known else NONE


def label(name: str) -> str:
    """What an arm is called in tables."""
    known = arms()
    return known[name].label if name in known else name


def distinct(found: Found) -> dict[str, list[Record]]:
    """The records of each run, once, under the label of its first arm; in the grid's order.

    A label is marked as in `compared`.
    """
    version = newest(found)
    made: dict[str, list[Record]] = {}
    for name in arms():
        records = [r for r in found.get(name, {}).values() if r.arms[0] == name]
        if records:
            made[marked(label(name), records, version)] = records
    return made


def failures(records: Iterable[Record]) -> Sheet:
    """Runs without a result."""
    rows = tuple((record.arms[0], str(record.seed), record.reason) for record in records)
    return Sheet("Failed runs", ("arm", "seed", "reason"), rows)
