"""Curves of a training run: loss and AP, gradient norm, residual of the refinement.

Drawn with matplotlib's object interface: no pyplot, no display, and imported when a plot is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from detection.drawing import PALETTE
from detection.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, GRID = "#181C24", "#6B7280", "#E5E7EB"
"""Of titles, of numbers and labels, of lines behind the curves."""
_RED, _BLUE, _GREEN, _VIOLET = PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[4]


def plot_training(
    log: Sequence[Mapping[str, Any]], residuals: Tensor | None, path: Path | str
) -> None:
    """Write a PNG of the loss (with AP where known), the gradient norm, and the residual.

    The first two are shown as they were, faint, and smoothed.  The residual is the median over
    the images, with a band from the 10 % to the 90 % quantile.

    Args:
        log: records with ``step``, ``loss`` and ``gradient_norm``, as the training loop writes
            them; those of an evaluation have ``scores`` with ``AP`` instead.
        residuals: ``(steps, images)`` relative residual at each refinement; `None` leaves the
            panel out.
        path: of the PNG.

    Raises:
        ValueError: if the log has no training record, or ``residuals`` has another shape.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "training.png"
        >>> log = [{"step": n, "loss": 9 / n, "gradient_norm": 1.0} for n in range(1, 9)]
        >>> plot_training(log, torch.rand(20, 4), path)
        >>> path.stat().st_size > 10000
        True
    """
    figure = training_figure(log, residuals)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def training_figure(log: Sequence[Mapping[str, Any]], residuals: Tensor | None) -> Figure:
    """The figure of `plot_training`, to be saved in any format."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = [record for record in log if "loss" in record]
    if not rows:
        raise ValueError("plot_training: the log has no training record, one with a loss.")
    if residuals is not None and (residuals.ndim != 2 or 0 in residuals.shape):
        raise ValueError(
            f"plot_training: residuals are {tuple(residuals.shape)}; (steps, images) is needed."
        )
    panels = 2 if residuals is None else 3
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(4.7 * panels, 3.8), dpi=150, layout=layout)
    axes = figure.subplots(1, panels)
    steps = np.array([record["step"] for record in rows], dtype=float)
    for axis, name, title, colour in (
        (axes[0], "loss", "Training loss", _BLUE),
        (axes[1], "gradient_norm", "Gradient norm", _VIOLET),
    ):
        values = np.array([record[name] for record in rows], dtype=float)
        values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        axis.plot(steps, smoothed(values), color=colour, linewidth=2.2)
        _style(axis, title, "training step", values)
    scored = [(record["step"], record["scores"].get("AP")) for record in log if "scores" in record]
    found = [(step, value) for step, value in scored if value is not None and value == value]
    if found:
        _precision(axes[0], found)
    if residuals is not None:
        _residual(axes[2], residuals.detach().double().cpu().numpy())
    return figure


def smoothed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Geometric mean of the known values around each, with Gaussian weights of 1/60 of the length.

    A straight line on a logarithmic scale stays where it is, so nothing lags behind.  NaN is
    unknown, and stays NaN where nothing is known nearby.

    Example:
        >>> smoothed(np.array([3.0, np.nan, 3.0])).round(6).tolist()
        [3.0, 3.0, 3.0]
    """
    width = max(len(values) / 60, 1.0)
    reach = min(math.ceil(3 * width), (len(values) - 1) // 2)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    known = ~np.isnan(values)
    share = np.convolve(known.astype(float), weights, "same")
    logarithms = np.convolve(np.log(np.where(known, values, 1.0)), weights, "same")
    return np.exp(np.divide(logarithms, share, out=np.full(len(values), np.nan), where=share > 0))


def _precision(axis: Axes, found: Sequence[tuple[int, float]]) -> None:
    """AP of the evaluations, on a scale of its own at the right."""
    right = axis.twinx()
    right.spines[["top", "left", "right", "bottom"]].set_visible(False)
    right.set(ylim=(0, 1))
    right.tick_params(length=0, labelsize=9, labelcolor=_GREEN)
    steps, values = zip(*found, strict=True)
    right.plot(steps, values, "-o", color=_GREEN, linewidth=1.4, markersize=5)
    right.annotate(
        f"AP {values[-1]:.3f}",
        (steps[-1], values[-1]),
        (0, 8 if values[-1] < 0.9 else -16),
        textcoords="offset points",
        ha="right",
        color=_GREEN,
        fontsize=10,
        fontweight="bold",
    )


def _residual(axis: Axes, values: np.ndarray[Any, Any]) -> None:
    # Quantiles that are values of the data also stand where some images diverged.
    worst = np.where(np.isfinite(values), values, np.inf)
    quantiles = np.quantile(worst, (0.1, 0.5, 0.9), axis=1, method="nearest")
    shown = quantiles[np.isfinite(quantiles) & (quantiles > 0)]
    # A logarithmic axis has no place for 0 or infinity: they lie on the edge of what it shows.
    edges = (shown.min(), shown.max()) if shown.size else (np.nan, np.nan)
    low, middle, high = quantiles.clip(*edges)
    steps = np.arange(1, len(values) + 1)
    axis.fill_between(steps, low, high, color=_RED, alpha=0.18, linewidth=0, label="10–90 %")
    axis.plot(steps, middle, "-o", color=_RED, linewidth=2.2, markersize=4, label="median")
    _style(axis, "Relative residual of the refinement", "refinement step", shown)
    count = values.shape[1]
    legend = axis.legend(
        title=f"{count} image{'s' if count > 1 else ''}",
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        labelcolor=GREY,
    )
    legend.get_title().set_color(GREY)


def _style(axis: Axes, title: str, across: str, values: np.ndarray[Any, Any]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axis.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=12)
    axis.set_xlabel(across, fontsize=10, color=GREY)
    axis.set_yscale("log")
    known = values[np.isfinite(values) & (values > 0)]
    decades = math.log10(known.max() / known.min()) if known.size else 0.0
    axis.yaxis.set_minor_locator(NullLocator())
    if decades < 2.5:
        few = MaxNLocator(5) if decades < 0.7 else LogLocator(subs=(1.0, 2.0, 5.0))
        axis.yaxis.set_major_locator(few)
        axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.tick_params(which="both", length=0, labelsize=9, labelcolor=GREY)
    axis.grid(True, axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
