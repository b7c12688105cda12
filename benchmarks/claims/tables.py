"""What was found, as tables: for the terminal, and as Markdown for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from rich.table import Table

from benchmarks.claims.grid import CLAIMS, COMPARISONS, Comparison, Row, arms
from benchmarks.claims.results import Record
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
    """Everything that can be told of what was found."""
    made = [verdicts(found), *(compared(found, comparison) for comparison in COMPARISONS)]
    made += [gradients(found), refinements(found), residuals(found), fixed_points(found)]
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
    """A table of the paper, with what was measured beside its figures; `None` of a lone row."""
    measured = [row for row in comparison.rows if ap_of(found, row)]
    if len({row.arm for row in measured}) < 2:
        return None
    costs = comparison.name == "2"
    head = ("", "paper's AP", "AP", "AP50", "AP75", "small", "medium", "large", "seeds")
    more = ("parameters", "images/s", "training memory", "inference memory", "minutes")
    rows = []
    for row in measured:
        records = list(found[row.arm.name].values())
        cells = [row.label, NONE if row.paper is None else f"{row.paper:.1f}"]
        cells.append(str(Estimate.of(list(ap_of(found, row).values()))))
        cells += [
            _figure(record_figures(record, row.refinements).get(name) for record in records)
            for name in ("AP50", "AP75", "AP_small", "AP_medium", "AP_large")
        ]
        cells.append(str(len(records)))
        rows.append((*cells, *(_costs(row, records) if costs else ())))
    title = f"Table {comparison.name}: {comparison.title}"
    return Sheet(title, (*head, *more) if costs else head, tuple(rows))


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


def spread(record: Record) -> float:
    """How unsteady the gradient norm is: its deviation over its mean, the median of windows."""
    history = record.history
    after = len(history["norm"]) // 10  # the warm-up
    pairs = list(zip(history["norm_deviation"], history["norm"], strict=True))[after:]
    return median(float(deviation) / max(float(norm), 1e-12) for deviation, norm in pairs)


def gradients(found: Found) -> Sheet:
    """Fig. 4 in figures."""
    rows = []
    for name, records in distinct(found).items():
        norms = [median(map(float, record.history["norm"])) for record in records]
        most = [max(map(float, record.history["norm_most"])) for record in records]
        unsteady = Estimate.of([100 * spread(record) for record in records])
        rows.append((name, f"{fmean(norms):.1f}", f"{fmean(most):.0f}", f"{unsteady} %"))
    head = ("", "median norm", "largest", "deviation over mean")
    return Sheet("Figure 4: gradient norm before clipping", head, tuple(rows))


def refinements(found: Found) -> Sheet:
    """AP of DEQDet by how and how long it is refined."""
    rows: list[tuple[str, ...]] = []
    records = list(found.get("deqdet", {}).values())
    keys = dict.fromkeys((p["kind"], p["setting"]) for r in records for p in r.inference["curve"])
    for kind, setting in keys:
        points = [
            p
            for record in records
            for p in record.inference["curve"]
            if (p["kind"], p["setting"]) == (kind, setting)
        ]
        ap = Estimate.of([100 * p["AP"] for p in points])
        rows.append((kind, setting, f"{fmean(p['steps'] for p in points):.1f}", str(ap)))
    return Sheet("DEQDet: AP by refinements", ("", "setting", "mean steps", "AP"), tuple(rows))


def _with(found: Found, what: str) -> dict[str, list[Any]]:
    every = {
        name: [record.inference[what] for record in records if record.inference.get(what)]
        for name, records in distinct(found).items()
    }
    return {name: values for name, values in every.items() if values}


def residuals(found: Found) -> Sheet:
    """How far a refinement still moves, over the validation images."""
    rows = []
    for name, each in _with(found, "residuals").items():
        middle = each[0]["percentiles"].index(50)
        cells = [name]
        for step in (1, 6, 12, 25):
            low, mid, high = (
                fmean(float(one["content"][step - 1][k]) for one in each) for k in (0, middle, -1)
            )
            cells.append(f"{mid:.2g} ({low:.2g} to {high:.2g})")
        moved = fmean(float(one["boxes"][24][middle]) for one in each)
        rows.append((*cells, f"{moved:.2g} px"))
    head = ("", *(f"refinement {step}" for step in (1, 6, 12, 25)), "boxes at 25")
    title = "Change of the contents at a refinement, relative: median (5 to 95 %) of the images"
    return Sheet(title, head, tuple(rows))


def fixed_points(found: Found) -> Sheet:
    """Whether there is a fixed point, on a sample of validation images."""
    rows = []
    for name, each in _with(found, "fixed_point").items():
        looks = [look for one in each for look in one]

        def middle(of: Callable[[Any], Any], looks: list[Any] = looks) -> float:
            known = [float(value) for value in map(of, looks) if value is not None]
            return median(known) if known else math.nan

        others = [other for look in looks for other in look["from"].values()]
        rows.append(
            (
                name,
                f"{middle(lambda look: look['content'][0]):.2g}",
                f"{middle(lambda look: look['content'][-1]):.2g}",
                f"{middle(lambda look: look['anderson']):.2g}",
                f"{middle(lambda look: look['rate']):.2f}",
                f"{middle(lambda look: look['radius']):.2f}",
                f"{median(float(other['content']) for other in others):.2g}",
                f"{median(float(other['boxes']) for other in others):.2g} px",
                f"{100 * fmean(float(other['agreeing']) for other in others):.0f} %",
                str(len(looks)),
            )
        )
    head = (
        "",
        "change at 25",
        "at 200",
        "Anderson's residual",
        "rate",
        "spectral radius",
        "limits apart, contents",
        "boxes",
        "same detections",
        "images",
    )
    return Sheet("Is there a fixed point? Medians over images and seeds", head, tuple(rows))


def failures(records: Iterable[Record]) -> Sheet:
    """Runs without a result."""
    rows = tuple((record.arms[0], str(record.seed), record.reason) for record in records)
    return Sheet("Failed runs", ("arm", "seed", "reason"), rows)
