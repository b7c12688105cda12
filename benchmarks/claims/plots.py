"""The figures: AP over epochs, gradient norms, AP over refinements, residuals; one style."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.claims.grid import COMPARISONS
from benchmarks.claims.results import Record
from benchmarks.claims.statistics import Estimate
from benchmarks.claims.tables import Found, ap_of, distinct

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
DASHED = ("RNNDet", "AdaMixer")

Runs = Mapping[str, Sequence[Record]]


def draw(found: Found, folder: Path, preset: str) -> list[Path]:
    """Every plot for which there is something to show; their paths."""
    every = distinct({name: found[name] for name in SHOWN if name in found})
    runs = {name: _alike(records) for name, records in every.items()}
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
    return {"label": name, "linestyle": "--" if name.startswith(DASHED) else "-"}


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
        _band(axes, x, [[100 * e["AP"] for e in record.epochs] for record in records], name)
    axes.set(xlabel="epoch", ylabel="AP, %", title="Convergence (the paper's Figure 5)")
    return bool(runs)


def gradients(axes: Axes, runs: Runs) -> bool:
    """Fig. 4: gradient norm against steps, with its deviation from step to step."""
    for name, records in runs.items():
        history = records[0].history
        norm, deviation = (
            np.mean([np.asarray(r.history[key], dtype=float) for r in records], axis=0)
            for key in ("norm", "norm_deviation")
        )
        (line,) = axes.plot(history["step"], norm, **_style(name))
        low, high = np.maximum(norm - deviation, 1e-3), norm + deviation
        axes.fill_between(history["step"], low, high, color=line.get_color(), alpha=0.12)
    axes.set(xlabel="step", ylabel="gradient norm", title="Gradient norm (Figure 4)")
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
            y = np.mean([[100 * p["AP"] for p in each] for each in points], axis=0)
            shown = name if kind == "naive" else f"{name}, {kind}"
            axes.plot(x, y, marker=marker, **_style(shown))
    axes.set(xlabel="refinements after the first layer", ylabel="AP, %", title="Refining on")
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
    axes.set(xlabel="refinement", ylabel="relative change of the contents", title="Residuals")
    axes.set_yscale("log")
    return drawn


def differences(axes: Axes, found: Found) -> bool:
    """Every measured row beside the paper's figure, both against DEQDet in full."""
    labels, here, paper = [], [], []
    full = {seed: record.ap for seed, record in found.get("deqdet", {}).items()}
    for comparison in COMPARISONS:
        for row in comparison.rows:
            mine = ap_of(found, row)
            seeds = sorted(set(mine) & set(full))
            if not seeds or row.paper is None or (row.refinements is None and mine == full):
                continue
            labels.append(f"{comparison.name}: {row.label}")
            here.append(Estimate.of([mine[seed] - full[seed] for seed in seeds]))
            paper.append(row.paper - (45.3 if comparison.name == "2" else 45.5))
    if not labels:
        return False
    places = np.arange(len(labels))[::-1]
    half = [estimate.half if estimate.count > 1 else 0.0 for estimate in here]
    axes.errorbar([e.mean for e in here], places, xerr=half, fmt="o", label="here, 95 %")
    axes.plot(paper, places, "D", fillstyle="none", label="paper")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, labels, fontsize="small")
    axes.set(xlabel="AP beside DEQDet in full", title="Rows of the paper's tables")
    return True
