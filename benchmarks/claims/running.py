"""Runs beside each other, each in a process of its own; what ends is told at once."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.claims.jobs import Job, execute
from benchmarks.claims.presets import Preset, cores
from benchmarks.claims.results import Record, latest
from detection.training.recipe import Recipe


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


def with_backbone(made: Recipe, weights: str) -> Recipe:
    """The recipe, beginning from other weights of the backbone."""
    backbone = replace(made.model.backbone, weights=weights)
    return replace(made, model=replace(made.model, backbone=backbone))


def remaining(jobs: Sequence[Job], records: Iterable[Record], retry: bool) -> list[Job]:
    """The jobs without a result; with one that failed only to ``retry``."""
    known = latest(records)

    def is_left(job: Job) -> bool:
        record = known.get((job.run, job.recipe.seed))
        return record is None or (retry and not record.finished)

    return [job for job in jobs if is_left(job)]


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Nobody else works in a folder.

    Raises:
        SystemExit: with a sentence, if somebody does.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(
                f"Another process works on this preset in {work}: wait for it, or end it."
            ) from None
        yield


@contextmanager
def deaf() -> Iterator[None]:
    """Processes started inside do not hear Ctrl-C: it is for the one that started them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(jobs: Sequence[Job], parallel: int, on_end: Callable[[Job, Record], None]) -> None:
    """Do the jobs, ``parallel`` at once; ``on_end`` takes each record as it comes.

    Ctrl-C ends those that go on; they continue from their checkpoints another time.
    """
    context = multiprocessing.get_context("spawn")
    waiting, going = list(jobs), dict[int, tuple[BaseProcess, Job]]()
    try:
        while waiting or going:
            while waiting and len(going) < parallel:
                job = waiting.pop(0)
                found = left_behind(job)
                if found is not None:
                    on_end(job, found)
                    continue
                process = context.Process(target=execute, args=(job,))
                with deaf():
                    process.start()
                going[process.sentinel] = process, job
            for sentinel in wait(list(going)) if going else ():
                process, job = going.pop(sentinel)  # type: ignore[index]
                process.join()
                record = left_behind(job) or job.record("failed", reason=_ending(process, job))
                on_end(job, record)
    finally:
        for process, _ in going.values():
            process.terminate()
        for process, _ in going.values():
            process.join()


def left_behind(job: Job) -> Record | None:
    """The record that a job has left in its folder, if it has."""
    try:
        return Record(**json.loads(job.result.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def forget(job: Job) -> None:
    """Let a job that failed be done again, from its last checkpoint."""
    job.result.unlink(missing_ok=True)


def _ending(process: BaseProcess, job: Job) -> str:
    code = process.exitcode or 0
    if code < 0:
        return f"The process was ended by signal {-code}" + (
            ", as the system does where memory runs out." if code == -9 else "."
        )
    try:
        said = (job.folder / "output.txt").read_text(errors="replace").strip().splitlines()
    except OSError:
        said = []
    return f"The process ended with {code}: {said[-1] if said else 'it said nothing'}"
