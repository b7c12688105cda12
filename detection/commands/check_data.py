"""``deqdet check-data``: what a data set holds, and everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from detection.commands.base import Command
from detection.commands.console import FAULTY, Stopped
from detection.data import check_folder
from detection.distributed import Distributed


@dataclass(frozen=True)
class CheckData(Command):
    """Report on a data set: counts, classes, sizes, and every problem with its remedy.

    Every image is decoded.  The exit status is 1 if something keeps the data from being trained
    on.

    Args:
        data: folder of the data set: COCO, YOLO or Pascal VOC.
        sheet: draw some images with their boxes into this file (.png, .jpg).
        queries: of the detector; images with more objects than these are told.
        all: show every problem, and not only the first five of each kind.
    """

    data: tyro.conf.Positional[Path]
    sheet: Path | None = None
    queries: int | None = None
    all: bool = False

    def run(self, distributed: Distributed, console: Console) -> None:
        report = check_folder(self.data, num_queries=self.queries, console=console)
        console.print(report.table(most=None if self.all else 5))
        if self.sheet is not None:
            report.contact_sheet(self.sheet)
            console.print(f"Drawn: {self.sheet}")
        if not report.ok:
            raise Stopped(FAULTY)
