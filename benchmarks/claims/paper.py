"""What the paper prints: the figures of its Tables 2 and 4, of COCO and 12 epochs."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


@dataclass(frozen=True)
class Costs:
    """What a detector of the paper's Table 2 costs, in its units.

    Args:
        parameters: in millions.
        rate: images a second ("FPS").
        training, inference: memory, in MB.
        hours: of training.
    """

    parameters: float
    rate: float
    training: float
    inference: float
    hours: float


@dataclass(frozen=True)
class Printed:
    """A row of a table of the paper.

    Args:
        table: that prints it.
        figures: in per cent, as in `NAMES`; the last three only in Table 2.
        costs: only in Table 2.
    """

    table: str
    figures: tuple[float, ...]
    costs: Costs | None = None

    def figure(self, name: str) -> float | None:
        """By its name in the results."""
        return dict(zip(NAMES, self.figures, strict=False)).get(name)


def _printed(table: str, rows: dict[str, tuple[float, ...]]) -> dict[str, Printed]:
    return {label: Printed(table, figures) for label, figures in rows.items()}


def _table_2(rows: dict[str, tuple[float, ...]]) -> dict[str, Printed]:
    """Of rows as the paper's Table 2 has them: figures, then costs."""
    count = len(NAMES)
    return {
        label: Printed("2", cells[:count], Costs(*cells[count:])) for label, cells in rows.items()
    }


# What was trained once and is read at several NF has one training in the paper, and one here.
PAPER: dict[str, dict[str, Printed]] = {
    "2": _table_2({
        "AdaMixer, NF = 6": (42.7, 61.5, 45.9, 24.7, 45.4, 59.2, 134, 13.5, 5961, 872, 14.0),
        "AdaMixer†, NF = 6": (42.7, 61.5, 46.1, 24.9, 45.5, 59.3, 160, 13.5, 6803, 972, 15.5),
        "RNNDet, NF = 6": (43.4, 62.0, 46.5, 26.3, 46.1, 58.8, 61, 13.6, 4517, 588, 12.0),
        "RNNDet, NF = 8": (44.2, 62.9, 47.9, 26.5, 47.2, 60.1, 61, 12.0, 4784, 588, 13.5),
        "RNNDet, NF = 12": (44.2, 63.1, 47.7, 26.1, 47.0, 60.0, 61, 9.2, 5567, 588, 17.5),
        "RNNDet, NF = 16": (43.8, 62.7, 47.2, 26.9, 46.7, 59.1, 61, 7.7, 6195, 588, 22.0),
        "RNNDet, NF = 20": (43.7, 62.5, 47.0, 26.5, 46.4, 59.6, 61, 5.9, 6818, 588, 24.0),
        "DEQDet, NF = 6": (44.3, 63.0, 47.6, 26.2, 47.1, 60.5, 61, 13.6, 4827, 588, 25.5),
        "DEQDet, NF = 8": (44.9, 63.6, 48.2, 27.0, 47.5, 61.1, 61, 12.0, 4827, 588, 25.5),
        "DEQDet, NF = 16": (45.2, 63.9, 48.8, 27.5, 47.9, 61.3, 61, 7.7, 4827, 588, 25.5),
        "DEQDet, NF = 25": (45.3, 64.0, 48.9, 27.7, 47.9, 61.5, 61, 5.1, 4827, 588, 25.5),
        "DEQDet†, NF = 6": (45.7, 64.3, 49.3, 27.5, 48.7, 61.9, 69, 13.0, 4997, 622, 29.0),
        "DEQDet†, NF = 25": (46.0, 64.8, 49.6, 27.5, 49.0, 61.4, 69, 4.8, 4997, 622, 29.0),
    }),
    "4a": _printed("4a", {
        "/": (45.2, 63.8, 48.8),
        "32": (45.3, 64.0, 48.9),
        "64": (45.5, 64.4, 49.1),
    }),
    "4b": _printed("4b", {
        "0": (44.7, 63.4, 48.2),
        "1": (45.1, 63.8, 48.8),
        "2": (45.5, 64.4, 49.1),
    }),
    "4c": _printed("4c", {
        "RAG(1) = JFB": (41.9, 60.7, 45.0),
        "RAG(2)": (45.5, 64.4, 49.1),
        "RAG(3)": (45.5, 64.2, 49.4),
        "RAG(4)": (45.7, 64.2, 49.9),
    }),
    "4d": _printed("4d", {
        "m = 4, C = 3": (45.5, 64.4, 49.1),
        "m = 4, C = 4": (45.4, 63.9, 49.2),
        "m = 3, C = 3": (45.1, 64.0, 48.9),
        "m = 5, C = 3": (45.2, 63.8, 48.8),
    }),
    "4e": _printed("4e", {
        "/": (44.3, 63.1, 47.8),
        "zero-step": (44.9, 63.8, 48.6),
        "one-step": (45.1, 63.9, 48.6),
        "multi-step": (45.5, 64.4, 49.1),
    }),
    "4f": _printed("4f", {
        "0 / 0": (44.3, 63.1, 47.8),
        "0 / 25": (45.4, 64.2, 49.0),
        "0 / 50": (45.5, 64.5, 49.1),
        "0.1 / 0": (45.0, 63.6, 48.5),
        "0.2 / 0": (45.2, 64.3, 48.6),
    }),
    "4g": _printed("4g", {
        "0.1 / 25": (45.5, 64.4, 49.1),
        "0.1 / 50": (45.5, 64.4, 49.1),
        "0.2 / 25": (45.2, 63.9, 49.0),
        "0.2 / 50": (45.2, 63.9, 49.2),
    }),
    "4h": _printed("4h", {
        "15": (45.1, 63.8, 48.7),
        "20": (45.5, 64.4, 49.1),
        "25": (45.3, 64.0, 48.9),
    }),
}  # fmt: skip
"""By table and row, as `benchmarks.claims.grid` labels it."""
