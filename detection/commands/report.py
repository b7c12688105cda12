"""``deqdet report``: one page that tells what a run has come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from detection.commands.base import Command
from detection.commands.options import check_threshold
from detection.distributed import Distributed
from detection.report import write_report


@dataclass(frozen=True)
class Report(Command):
    """Write report.html into the folder of a run: scores, curves, detections, refinement.

    The page is one file that loads nothing; it can be sent, and opened without a network.

    Args:
        folder: of the run.
        data: folder of its data set; by default where it lay when the run was begun.
        threshold: lowest score that is drawn, and that counts in the confusion matrix.
        device: cuda, cuda:1 or cpu; by default CUDA if there is one.
    """

    folder: tyro.conf.Positional[Path]
    data: Path | None = None
    threshold: float = 0.3
    device: str | None = None

    def check(self) -> None:
        check_threshold(self.threshold)

    def run(self, distributed: Distributed, console: Console) -> None:
        if not distributed.is_main:
            return
        path = write_report(
            self.folder,
            self.data,
            threshold=self.threshold,
            device=distributed.device,
            console=console,
        )
        console.print(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
