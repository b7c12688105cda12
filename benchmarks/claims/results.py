"""The results as they are kept: one JSON object a line, appended as runs end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from detection.files import replacing
from detection.training.progress import JsonLines, restored

FORMAT = 1
DAMAGED: Final = "damaged"
NEWER: Final = "newer"


@dataclass(frozen=True)
class Record:
    """One run that has ended, well or not.

    Attributes:
        run: identity of what was trained: digest of the recipe without its seed, and of the data.
        arms: names of the arms that it is: those whose recipes are the same at this size.
        seed: of the run.
        status: ``finished`` or ``failed``.
        reason: why it failed.
        code: fingerprint of the code (`benchmarks.claims.versions`).
        data: its parameters, numbers of images and of validation objects, and ``digest``.
        recipe: the whole configuration.
        versions, device, threads, jobs: where it ran, and how many ran beside each other.
        date: of its end.
        place: ``cpu`` or ``cuda``; this and the next two are empty in records of before they were.
        commit: what was checked out, with ``-dirty`` where files differed from it.
        backbone: SHA-256 of the weights that the backbone began from, where they were a file.
        parameters: of the model.
        epochs: the twelve figures of COCO after each evaluation, in [0, 1], with ``epoch``.
        per_class: AP by class at the end.
        history: of consecutive windows of steps: last ``step``, mean ``loss``, and of the gradient
            norm before clipping ``norm``, ``norm_deviation`` and ``norm_most``; ``residual`` where
            there is a path.
        step_seconds: median of a training step, by the clock on the wall.
        step_processor_seconds: the same of the processors, all threads together; other work on
            the machine does not lengthen it.
        training_minutes: ``step_seconds`` times the steps; evaluations are left out.
        resumed: how often the run was taken up again.
        memory: bytes at the peak of a training step (``train``) and of the inference of one image
            (``inference``), weights and states of the optimiser included.
        rates: images a second at inference, by refinements: the median of some images of one size,
            or the fastest where there is no ``place``.
        inference: see `benchmarks.claims.inference`.
    """

    run: str
    arms: list[str]
    seed: int
    status: Literal["finished", "failed"]
    code: str
    data: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, Any]
    device: str
    threads: int
    jobs: int
    date: str
    place: str = ""
    commit: str = ""
    backbone: str = ""
    reason: str = ""
    parameters: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    per_class: dict[str, float] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)
    step_seconds: float = 0.0
    step_processor_seconds: float = 0.0
    training_minutes: float = 0.0
    resumed: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    inference: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self.status == "finished"

    @property
    def version(self) -> tuple[str, str]:
        """Fingerprints of code and data: only results that have both in common compare."""
        return self.code, str(self.data.get("digest", ""))

    @property
    def ap(self) -> float:
        """AP at the end, in per cent; NaN where there was nothing to find."""
        return _percent(self.epochs[-1]["AP"])

    def ap_at(self, refinements: int) -> float | None:
        """AP in per cent when read after so many refinements, if that was looked at."""
        for point in self.inference.get("curve", ()):
            if point["kind"] == "naive" and point["setting"] == str(refinements):
                return _percent(point["AP"])
        return None


def _percent(figure: float | None) -> float:
    return math.nan if figure is None else 100.0 * float(figure)


def path_of(folder: Path, preset: str) -> Path:
    """Where the results of a preset are."""
    return folder / f"claims-{preset}.jsonl"


def append(path: Path, record: Record) -> None:
    """Add a line; it is with the system before this returns."""
    with JsonLines(path) as lines:
        lines.write(asdict(record))


def read(path: Path) -> tuple[list[Record], list[str]]:
    """The records of a file, oldest first, and what there is to say of it.

    Nothing is written: who reads need not be alone.  What is no record (a line that a crash cut
    short, or one that is just being written) is passed over; `repair` puts it aside.
    """
    found = [parsed(line) for line in _lines(path)]
    told = []
    if count := found.count(DAMAGED):
        lines = "1 line is" if count == 1 else f"{count} lines are"
        told.append(f"{path}: {lines} damaged, and left out.")
    if count := found.count(NEWER):
        lines = "1 line is" if count == 1 else f"{count} lines are"
        told.append(
            f"{path}: {lines} of a newer format than {FORMAT}, and left out. Use the code that "
            "wrote them."
        )
    return [record for record in found if isinstance(record, Record)], told


def repair(path: Path) -> list[str]:
    """Put the damaged lines of a file aside in ``….aside``; nobody else may be writing.

    Returns:
        What there is to say of it.
    """
    lines = _lines(path)
    torn = [line for line in lines if parsed(line) == DAMAGED]
    if not torn:
        return []
    aside = path.with_name(f"{path.name}.aside")
    with open(aside, "ab") as file:
        file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in torn)
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(line for line in lines if parsed(line) != DAMAGED))
    were = "1 line was" if len(torn) == 1 else f"{len(torn)} lines were"
    return [f"{path}: {were} damaged and put aside in {aside.name}."]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def parsed(line: bytes) -> Record | Literal["damaged", "newer"]:
    """The record of a line that ends; or why it is none."""
    try:
        found = restored(json.loads(line))
        version = found["format"]
        if version == FORMAT and line.endswith(b"\n"):
            known = {f.name for f in fields(Record)}
            return Record(**{name: value for name, value in found.items() if name in known})
        return NEWER if version > FORMAT else DAMAGED
    except (ValueError, TypeError, KeyError, IndexError):
        return DAMAGED


def in_order(records: Iterable[Record]) -> list[Record]:
    """Records by date, those of the newest version after all others: a later one counts more."""
    dated = sorted(records, key=lambda record: record.date)
    if not dated:
        return []
    version = dated[-1].version
    return sorted(dated, key=lambda record: record.version == version)


def latest(records: Iterable[Record]) -> dict[tuple[str, int], Record]:
    """The record that counts of each run and seed: of the newest version, if it has one.

    Of one version it is the last, and a finished one before a failed; so what failed of the newest
    code is not covered up by a result of a former one.
    """
    found: dict[tuple[str, int], Record] = {}
    for record in in_order(records):
        known = found.get((record.run, record.seed))
        kept = known is not None and known.finished and known.version == record.version
        if record.finished or not kept:
            found[record.run, record.seed] = record
    return found


def of_version(
    records: Iterable[Record], version: tuple[str, str], any_version: bool = False
) -> tuple[list[Record], int]:
    """The records of one version of code and data, and how many others there are."""
    every = list(records)
    same = [record for record in every if record.version == version]
    return (every if any_version else same), len(every) - len(same)


def by_arm(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Finished records of each arm by seed; of an arm whose settings changed, the newest alone."""
    finished = [record for record in in_order(latest(records).values()) if record.finished]
    newest = {arm: record.run for record in finished for arm in record.arms}
    found: dict[str, dict[int, Record]] = {}
    for record in sorted(finished, key=lambda record: record.seed):
        for arm in record.arms:
            if record.run == newest[arm]:
                found.setdefault(arm, {})[record.seed] = record
    return found
