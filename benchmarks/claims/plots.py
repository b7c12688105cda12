"""The figures: AP over epochs, gradient norms, AP over refinements, residuals; one style."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.claims.grid import COMPARISONS, Row, row
from benchmarks.claims.results import Record
from benchmarks.claims.statistics import Estimate, difference
from benchmarks.claims.tables import Found, ap_of, distinct, label

SHOWN = (
    "adamixer",
    "rnndet-6",
    "rnndet-20",
    "deqdet",
    "quiet",
    "quiet-jfb",
    "rag-1",
    "neumann-2",
    "bptt",
)
"""Arms with a line of their own: what the paper's figures compare, and the gradients."""
COLOURS = {label(name): f"C{n}" for n, name in enumerate(SHOWN)}
"""An arm has the same in every plot."""
DASHED = ("RNNDet", "AdaMixer")
FULL = row("4c", "RAG(2)")
"""DEQDet in full, beside which rows are drawn."""
REFERENCES = {"2": row("2", "DEQDet, NF = 25")}
"""The same by comparison, where its first layer is another."""

Runs = Mapping[str, Sequence[Record]]


def draw(found: Found, folder: Path, preset: str) -> list[Path]:
    """Every plot for which there is something to show; their paths."""
    runs = {
        name: _alike(records)
        for name, records in distinct(found).items()
        if set(SHOWN) & set(records[0].arms[:1])
    }
    drawings: dict[str, Callable[[Axes, Runs], bool]] = {
        "epochs": epochs,
        "gradients": gradients,
        "refinements": refinements,
        "residuals": residuals,
    }
    paths = []
    for name, drawing in drawings.items():
        figure, axes = _figure()
        if drawing(axes, runs):
            paths.append(_save(figure, folder / f"claims-{preset}-{name}.png"))
    figure, axes = _figure(height=6.0)
    if differences(axes, found):
        paths.append(_save(figure, folder / f"claims-{preset}-rows.png"))
    return paths


def _figure(height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _style(name: str) -> dict[str, Any]:
    return {
        "label": name,
        "linestyle": "--" if name.startswith(DASHED) else "-",
        "color": COLOURS[name.removesuffix(" *")],
    }


def _per_cent(value: Any) -> float:
    return np.nan if value is None else 100 * float(value)


def _alike(records: Sequence[Record]) -> list[Record]:
    """Those that are as long as the first: results of other versions may be of other lengths."""
    first = records[0]
    return [
        record
        for record in records
        if record.history["step"] == first.history["step"]
        and len(record.epochs) == len(first.epochs)
    ]


def _band(axes: Axes, x: Sequence[float], each: Sequence[Sequence[float]], name: str) -> None:
    """The mean over seeds, and the range of the seeds around it."""
    values = np.asarray(each, dtype=float)
    (line,) = axes.plot(x, values.mean(0), **_style(name))
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)


def epochs(axes: Axes, runs: Runs) -> bool:
    """Fig. 5: AP against epochs."""
    for name, records in runs.items():
        x = [epoch["epoch"] for epoch in records[0].epochs]
        _band(axes, x, [[_per_cent(e["AP"]) for e in record.epochs] for record in records], name)
    title = "Convergence (the paper's Figure 5): mean, and range of the seeds"
    axes.set(xlabel="epoch", ylabel="AP, %", title=title)
    return bool(runs)


def gradients(axes: Axes, runs: Runs) -> bool:
    """Fig. 4: gradient norm against steps, from its mean to its largest in a window of steps."""
    for name, records in runs.items():
        steps = records[0].history["step"]
        norm, most = (
            np.mean([np.asarray(r.history[key], dtype=float) for r in records], axis=0)
            for key in ("norm", "norm_most")
        )
        (line,) = axes.plot(steps, norm, **_style(name))
        axes.fill_between(steps, norm, most, color=line.get_color(), alpha=0.12)
    title = "Gradient norm (Figure 4): mean of some steps, up to their largest"
    axes.set(xlabel="step", ylabel="gradient norm", title=title)
    axes.set_yscale("log")
    return bool(runs)


def refinements(axes: Axes, runs: Runs) -> bool:
    """AP against refinements at inference."""
    drawn = False
    for name, records in runs.items():
        for kind, marker in (("naive", ""), ("Anderson", "."), ("auto", "*")):
            points = [[p for p in r.inference["curve"] if p["kind"] == kind] for r in records]
            if not points[0] or (kind != "naive" and "deqdet" not in records[0].arms):
                continue
            drawn = True
            x = np.mean([[p["steps"] for p in each] for each in points], axis=0)
            y = np.mean([[_per_cent(p["AP"]) for p in each] for each in points], axis=0)
            style = _style(name)
            if kind != "naive":
                style |= {"label": f"{name}, {kind}", "linestyle": ":"}
            axes.plot(x, y, marker=marker, **style)
    title = "Refining on: mean of the seeds"
    axes.set(xlabel="refinements after the first layer", ylabel="AP, %", title=title)
    return drawn


def residuals(axes: Axes, runs: Runs) -> bool:
    """How much the contents still change, refinement by refinement: median, and 5 to 95 %."""
    drawn = False
    for name, records in runs.items():
        each = [r.inference["residuals"] for r in records if r.inference.get("residuals")]
        if not each:
            continue
        drawn = True
        values = np.mean([np.asarray(one["content"], dtype=float) for one in each], axis=0)
        steps = range(1, len(values) + 1)
        (line,) = axes.plot(steps, values[:, each[0]["percentiles"].index(50)], **_style(name))
        axes.fill_between(steps, values[:, 0], values[:, -1], color=line.get_color(), alpha=0.12)
    title = "Residuals: median of the images, and 5 to 95 % of them"
    axes.set(xlabel="refinement", ylabel="relative change of the contents", title=title)
    axes.set_yscale("log")
    return drawn


def differences(axes: Axes, found: Found) -> bool:
    """Every measured row beside the paper's figure, both against the same row, DEQDet in full."""
    rows = besides(found)
    labels = [label for label, _, _ in rows]
    here, paper = [apart for _, apart, _ in rows], [said for _, _, said in rows]
    if not rows:
        return False
    places = np.arange(len(labels))[::-1]
    for one, text in ((False, "here, mean and 95 %"), (True, "here, of one seed")):
        drawn = [n for n, estimate in enumerate(here) if (estimate.count == 1) == one]
        if drawn:
            axes.errorbar(
                [here[n].mean for n in drawn],
                places[drawn],
                xerr=None if one else [here[n].half for n in drawn],
                fmt="x" if one else "o",
                color="C0",
                label=text,
            )
    axes.plot(paper, places, "D", fillstyle="none", color="C1", label="paper")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, labels, fontsize="small")
    axes.set(xlabel="AP beside DEQDet in full", title="Rows of the paper's tables")
    return True


def besides(found: Found) -> list[tuple[str, Estimate, float]]:
    """Every row that can be drawn: its name, and how far it is from DEQDet in full."""
    rows = []
    for comparison in COMPARISONS:
        full = REFERENCES.get(comparison.name, FULL)
        for other in comparison.rows:
            apart = beside(found, other, full)
            if apart is not None:
                rows.append((f"{comparison.name}: {other.label}", *apart))
    return rows


def beside(found: Found, other: Row, full: Row) -> tuple[Estimate, float] | None:
    """How far a row is from DEQDet in full, here and in the paper.

    `None` of what is not measured, not in the paper, or the same run read in the same way.
    """
    mine, whole = ap_of(found, other), ap_of(found, full)
    same = mine == whole and other.refinements == full.refinements
    if other.paper is None or full.paper is None or same or not set(mine) & set(whole):
        return None
    return difference(mine, whole), round(other.paper - full.paper, 1)
