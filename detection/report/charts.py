"""Curves as SVG that lies in the page and takes its colours, by day and by night."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from detection.curves import GREY, GRID, INK, training_figure

_OF_THE_PAGE = {INK: "var(--ink)", GREY: "var(--grey)", GRID: "var(--line)"}


def training_chart(log: Sequence[Mapping[str, Any]], residuals: Tensor | None) -> str:
    """The figure of `detection.curves.training_figure` as an ``<svg>`` element.

    Example:
        >>> log = [{"step": n, "loss": 9 / n, "gradient_norm": 1.0} for n in range(1, 9)]
        >>> chart = training_chart(log, None)
        >>> chart[:4], chart.rstrip()[-6:], "var(--ink)" in chart
        ('<svg', '</svg>', True)
    """
    from matplotlib import rc_context

    text = io.StringIO()
    # Letters as text are drawn by the browser; ids that follow from the salt make equal runs
    # equal pages.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "training", "font.family": "sans"}):
        training_figure(log, residuals).savefig(
            text,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    chart = text.getvalue()
    for colour, name in _OF_THE_PAGE.items():
        chart = chart.replace(colour.lower(), name)
    return chart[chart.index("<svg") :]
