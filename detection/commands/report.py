"""``deqdet report``: a run as one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from detection.commands.base import Command
from detection.distributed import Distributed
from detection.report import write_report


@dataclass(frozen=True)
class Report(Command):
    """Write one page about a run: curves, scores, detections, refinement, confusion.

    The page, report.html in the run's folder, needs no other file and no network.

    Args:
        folder: of the run.
        data: folder of its data set; by default the one that the run was trained on.
        threshold: lowest score that is drawn and counted.
    """

    folder: tyro.conf.Positional[Path]
    data: Path | None = None
    threshold: float = 0.3

    def check(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: must lie in [0, 1].")

    def run(self, distributed: Distributed, console: Console) -> None:
        console.print(f"{write_report(self.folder, self.data, threshold=self.threshold)}")
