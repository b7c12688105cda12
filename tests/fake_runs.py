"""Stands in for a training run in tests of what runs them: ends as the name of its arm says.

Nothing heavy is imported before a run begins: a command has no need of it.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.claims.processes import started

if TYPE_CHECKING:
    from benchmarks.claims.cost import Timing
    from benchmarks.claims.jobs import Job
    from benchmarks.claims.results import Record

DATA = {"train_images": 40, "val_images": 10, "digest": "def"}


def make_job(folder: Path, arm: str, seed: int = 0) -> Job:
    from benchmarks.claims.jobs import Job
    from detection.recipes import recipe

    made = replace(recipe("deqdet_digits"), seed=seed)
    where = folder / f"{arm}-{seed}"
    return Job(f"run of {arm}", (arm,), "abc", made, DATA, folder, where, "cpu", 1, 2, 4)


def command(folder: Path) -> None:
    """Waits for a run that never ends."""
    started(wait_in, folder).join()


def wait_in(folder: Path) -> None:
    execute(make_job(folder, "waits"))


def execute(job: Job) -> None:
    """The target of a process; what it did is in the folder of the job."""
    from benchmarks.claims import jobs

    jobs.check_code = lambda code: None
    jobs.perform = perform
    jobs.execute(job)


def perform(job: Job) -> Record:
    with open(job.folder / "calls", "a") as calls:
        calls.write("x")
    _end(job)
    if job.arm == "waits":
        time.sleep(600)
    return job.record("finished", epochs=[{"epoch": 1, "AP": 0.4}])


def time_one(job: Job, path: Path) -> None:
    """The target of a process that times a few steps."""
    from benchmarks.claims import cost

    cost._timed = timed
    cost.time_one(job, path)


def timed(job: Job) -> Timing:
    from benchmarks.claims.cost import Timing

    _end(job)
    return Timing(step=1.0, image=0.1, weights=1, checkpoint=2, peak=3, host=4)


def _end(job: Job) -> None:
    if job.arm == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.arm == "exits":
        print("first\nthe last word", flush=True)
        raise SystemExit(7)
    if job.arm == "fails":
        raise ValueError("it cannot be done")
