"""Runs beside each other, each in a process of its own; what ends is told at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.claims.jobs import Job, execute, left_behind, on_card
from benchmarks.claims.presets import Preset, cores, with_backbone
from benchmarks.claims.processes import beside, started
from benchmarks.claims.results import Record, latest


def jobs_of(
    preset: Preset, root: Path, data: dict[str, Any], code: str, work: Path, parallel: int
) -> list[Job]:
    """Every run of a preset, once; all arms have their first seed first."""
    recipes = preset.recipes()
    if preset.teaching:
        path = str(work / f"backbone-{code}-{data['digest']}.safetensors")
        recipes = {name: with_backbone(made, path) for name, made in recipes.items()}
    return [
        Job(
            run=run,
            arms=names,
            code=code,
            recipe=replace(recipes[names[0]], seed=seed),
            data=data,
            root=root,
            folder=work / f"{names[0]}-seed{seed}-{run}-{code}-{data['digest']}",
            device=preset.device,
            threads=max(1, cores() // parallel),
            jobs=parallel,
            sample=preset.sample,
        )
        for seed in preset.seeds
        for run, names in preset.runs().items()
    ]


def remaining(jobs: Sequence[Job], records: Iterable[Record], retry: bool) -> list[Job]:
    """The jobs without a result; with one that failed only to ``retry``."""
    known = latest(records)

    def is_left(job: Job) -> bool:
        record = known.get((job.run, job.recipe.seed))
        return record is None or (retry and not record.finished)

    return [job for job in jobs if is_left(job)]


def run(jobs: Sequence[Job], parallel: int, on_end: Callable[[Job, Record], None]) -> None:
    """Do the jobs, ``parallel`` at once; ``on_end`` takes each record as it comes.

    Ctrl-C ends those that go on; they continue from their checkpoints another time.
    """

    def ended(job: Job, code: int) -> None:
        reason = ending(code, job.folder / "output.txt")
        on_end(job, left_behind(job) or job.record("failed", reason=reason))

    beside(jobs, parallel, lambda job, place: started(execute, on_card(job, place)), ended)


def forget(job: Job) -> None:
    """Let a job that failed be done again, from its last checkpoint; a result is kept."""
    record = left_behind(job)
    if record is not None and not record.finished:
        job.result.unlink(missing_ok=True)


def ending(code: int, output: Path) -> str:
    """How a process has ended that left nothing: its exit code, and its last word in a file."""
    if code < 0:
        return f"The process was ended by signal {-code}" + (
            ", as the system does where memory runs out." if code == -9 else "."
        )
    try:
        said = output.read_text(errors="replace").strip().splitlines()
    except OSError:
        said = []
    text = f"The process ended with {code}: {said[-1] if said else 'it said nothing'}"
    return f"{text} (the disk under {output.parent} is full)" if _is_full(output.parent) else text


def _is_full(folder: Path) -> bool:
    """Whether there is no room for so much as a word."""
    try:
        return shutil.disk_usage(folder).free < 2**16
    except OSError:
        return False
