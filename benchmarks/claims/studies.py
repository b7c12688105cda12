"""Tables of what lies beneath AP: gradients, refinements, residuals, fixed points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from statistics import fmean, median
from typing import Any

from benchmarks.claims.fixed_points import FAR, LOOKS
from benchmarks.claims.results import Record
from benchmarks.claims.statistics import Estimate, quantile
from benchmarks.claims.tables import NONE, Found, Sheet, distinct, marked, newest

SPIKE = 5
"""How many times its median a gradient norm is that is counted as a spike."""


def studies(found: Found) -> list[Sheet]:
    """Those of which there is something to tell."""
    made = (
        classes(found),
        gradients(found),
        refinements(found),
        residuals(found),
        movements(found),
        fixed_points(found),
        other_starts(found),
    )
    return [sheet for sheet in made if sheet.rows]


def classes(found: Found) -> Sheet:
    """Which classes are found worst and best."""
    rows = []
    for name, records in distinct(found).items():
        of_class: dict[str, list[float]] = {}
        for record in records:
            for known, ap in record.per_class.items():
                if ap is not None:
                    of_class.setdefault(known, []).append(100 * float(ap))
        if of_class:
            means = sorted((fmean(values), known) for known, values in of_class.items())
            lowest, highest = (
                ", ".join(f"{known} {ap:.1f}" for ap, known in some)
                for some in (means[:3], reversed(means[-3:]))
            )
            rows.append((name, lowest, f"{median(ap for ap, _ in means):.1f}", highest))
    return Sheet("AP by class", ("", "lowest", "median", "highest"), tuple(rows))


def _trained(record: Record, what: str) -> list[float]:
    """A course over training, window by window, without its first tenth, the warm-up."""
    every = [float(value) for value in record.history.get(what, ())]
    return every[len(every) // 10 :]


def spread(record: Record) -> float:
    """How unsteady the gradient norm is: its deviation over its mean, the median of windows."""
    pairs = zip(_trained(record, "norm_deviation"), _trained(record, "norm"), strict=True)
    return median(deviation / max(norm, 1e-12) for deviation, norm in pairs)


def spikes(record: Record) -> float:
    """Share of the windows with a step whose gradient norm is above `SPIKE` times the median."""
    most, limit = _trained(record, "norm_most"), SPIKE * median(_trained(record, "norm"))
    return fmean(norm > limit for norm in most)


def gradients(found: Found) -> Sheet:
    """Fig. 4 in figures."""
    rows = []
    for name, every in distinct(found).items():
        records = [record for record in every if record.history.get("norm")]
        if not records:
            continue
        norms = list(chain.from_iterable(_trained(record, "norm") for record in records))
        most = max(chain.from_iterable(_trained(record, "norm_most") for record in records))
        unsteady = Estimate.of([100 * spread(record) for record in records])
        left = [_trained(record, "residual") for record in records]
        ends = [median(values[-max(1, len(values) // 9) :]) for values in left if values]
        rows.append(
            (
                name,
                _ranged(norms, "{:.1f}".format),
                f"{most:.0f}",
                f"{100 * fmean(map(spikes, records)):.1f} %",
                f"{unsteady} %",
                f"{fmean(ends):.2g}" if ends else NONE,
            )
        )
    head = (
        "",
        "norm: median (5 to 95 %)",
        "largest",
        f"windows with a step above {SPIKE} × the median",
        "deviation over mean",
        "residual at the end",
    )
    notes = (
        "Of means over windows of equal length, up to 120 a run, without the first tenth of the "
        "training; the largest is that of single steps.",
        "Deviation over mean is the median of the windows, and so does not see rare spikes.",
        "The residual is that of the training's own paths where they end, their perturbation "
        "included, in the last tenth.",
    )
    return Sheet("Figure 4: gradient norm before clipping", head, tuple(rows), notes)


def _ranged(values: Sequence[float], as_text: Callable[[float], str] | None = None) -> str:
    told = as_text or brief
    middle, low, high = (told(quantile(values, share)) for share in (0.5, 0.05, 0.95))
    return f"{middle} ({low} to {high})"


def brief(value: float, digits: int = 2) -> str:
    """Two digits of what is small, whole numbers of what is not, powers of what ran away.

    Example:
        >>> brief(0.0123), brief(131.7), brief(4.6e12), brief(1.043, 3)
        ('0.012', '132', '4.6e+12', '1.04')
    """
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.{digits}g}"


def refinements(found: Found) -> Sheet:
    """AP of DEQDet by how and how long it is refined."""
    rows: list[tuple[str, ...]] = []
    records = list(found.get("deqdet", {}).values())
    title = marked("DEQDet: AP by refinements", records, newest(found))
    keys = dict.fromkeys((p["kind"], p["setting"]) for r in records for p in r.inference["curve"])
    for kind, setting in keys:
        points = [
            p
            for record in records
            for p in record.inference["curve"]
            if (p["kind"], p["setting"]) == (kind, setting)
        ]
        ap = Estimate.of([100 * p["AP"] for p in points if p["AP"] is not None])
        rows.append((kind, setting, f"{fmean(p['steps'] for p in points):.1f}", str(ap)))
    notes = (
        "Anderson is read at that of its states, among the steps taken, whose residual as a whole, "
        "positions included, is least; all steps are counted.",
    )
    return Sheet(title, ("", "setting", "mean steps", "AP"), tuple(rows), notes)


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
        contents = (_spread_at(each, "content", step) for step in (1, 6, 12, 25))
        boxes, state = (_spread_at(each, what, 25) for what in ("boxes", "state"))
        rows.append((name, *contents, f"{boxes} px", state))
    steps = (f"refinement {step}" for step in (1, 6, 12, 25))
    head = ("", *steps, "boxes at 25", "whole state at 25")
    title = "Change of the contents at a refinement, relative: median (5 to 95 %) of the images"
    notes = (
        "The whole state holds positions and boxes in pixels beside the contents: its relative "
        "change is another figure, and the one that Anderson's residual below compares with.",
    )
    return Sheet(title, head, tuple(rows), notes)


def _spread_at(each: Sequence[Any], what: str, step: int) -> str:
    """Median and ends of what was kept of the images' changes at a step, mean of the seeds."""
    kept = [(one[what][step - 1], one["percentiles"].index(50)) for one in each if what in one]
    if not kept:
        return NONE
    places = [(middle, 0, -1) for _, middle in kept]
    mid, low, high = (
        fmean(float(row[place[n]]) for (row, _), place in zip(kept, places, strict=True))
        for n in range(3)
    )
    return f"{brief(mid)} ({brief(low)} to {brief(high)})"


def _looks(found: Found) -> Iterator[tuple[str, list[Any]]]:
    """The images that were looked at closely, all seeds together, by arm."""
    for name, each in _with(found, "fixed_point").items():
        yield name, [look for one in each for look in one]


def movements(found: Found) -> Sheet:
    """Whether a refinement comes to rest, on a sample of validation images."""
    rows = []
    for name, looks in _looks(found):
        contents, boxes = (
            [[float(look[what][n]) for look in looks] for n in range(len(LOOKS))]
            for what in ("content", "boxes")
        )
        rows.append(
            (
                name,
                *(_ranged(values) for values in contents),
                *(f"{_ranged(values)} px" for values in boxes),
                f"{brief(quantile(boxes[-1], 1))} px",
                str(len(looks)),
            )
        )
    head = (
        "",
        *(f"contents at {step}" for step in LOOKS),
        *(f"boxes at {step}" for step in LOOKS),
        f"most at {LOOKS[-1]}",
        "images",
    )
    title = (
        "Does it come to rest? Change at a refinement: median (5 to 95 %) of some images and all "
        "seeds"
    )
    notes = (
        "Boxes are those of all queries, also of such that detect nothing; sides in the mean.",
    )
    return Sheet(title, head, tuple(rows), notes)


def fixed_points(found: Found) -> Sheet:
    """Whether a refinement draws near to something where it ends."""
    rows = []
    for name, looks in _looks(found):

        def known(of: Callable[[Any], Any], looks: list[Any] = looks) -> list[float]:
            return [float(value) for value in map(of, looks) if value is not None]

        rates, radii = known(lambda look: look["rate"]), known(lambda look: look["radius"])
        above = fmean(not radius <= 1 for radius in radii) if radii else None
        rows.append(
            (
                name,
                _ranged(rates, "{:.2f}".format) if rates else NONE,
                _ranged(radii, partial(brief, digits=3)) if radii else NONE,
                NONE if above is None else f"{100 * above:.0f} %",
                brief(quantile(radii, 1), 3) if radii else NONE,
                _ranged(known(lambda look: look["anderson"])),
                str(len(looks)),
            )
        )
    head = (
        "",
        "rate",
        "spectral radius",
        "radius above 1",
        "largest radius",
        f"least residual of {FAR // 2} steps of Anderson, whole state",
        "images",
    )
    notes = (
        f"The spectral radius is taken at the last of {FAR} naive refinements, which is no fixed "
        "point where they do not come to rest, and of the contents alone: positions are left out.",
        "Anderson's residual is that of its best state as a whole, positions and boxes in pixels "
        "included, and does not compare with the change of the contents.",
    )
    title = "Is there a fixed point? Median (5 to 95 %) of some images and all seeds"
    return Sheet(title, head, tuple(rows), notes)


def other_starts(found: Found) -> Sheet:
    """Whether paths that begin elsewhere end at the same, one line for each kind of start."""
    rows = []
    for name, looks in _looks(found):
        for start in dict.fromkeys(start for look in looks for start in look["from"]):
            others = [look["from"][start] for look in looks if start in look["from"]]

            def of(what: str, unit: str = "", others: list[Any] = others) -> str:
                values = [float(other[what]) for other in others if what in other]
                return f"{_ranged(values)}{unit}" if values else NONE

            rows.append(
                (
                    name,
                    start,
                    of("start_content"),
                    of("content"),
                    of("start_boxes", " px"),
                    of("boxes", " px"),
                    f"{100 * fmean(float(other['agreeing']) for other in others):.0f} %",
                    str(len(others)),
                )
            )
    head = (
        "",
        "begins with",
        "contents apart at first",
        "at the end",
        "boxes apart at first",
        "boxes at the end",
        "same detections",
        "images",
    )
    title = (
        f"From another start, after {FAR} refinements: how far from the usual path's end; median "
        "(5 to 95 %) of some images and all seeds"
    )
    notes = (
        "Distances are over all queries, also those that detect nothing; same detections are the "
        "mean share of those that both ends have.",
    )
    return Sheet(title, head, tuple(rows), notes)
