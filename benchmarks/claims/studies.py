"""Tables of what lies beneath AP: gradients, refinements, residuals, fixed points."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

from benchmarks.claims.results import Record
from benchmarks.claims.statistics import Estimate
from benchmarks.claims.tables import Found, Sheet, distinct


def studies(found: Found) -> list[Sheet]:
    """Those of which there is something to tell."""
    made = (gradients(found), refinements(found), residuals(found), fixed_points(found))
    return [sheet for sheet in made if sheet.rows]


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
