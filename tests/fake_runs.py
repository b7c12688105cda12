"""Stands in for a training run in tests of what runs them: ends as the name of its arm says."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.claims.jobs import Job, write


def execute(job: Job) -> None:
    """The target of a process; what it did is in the folder of the job."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "calls", "a") as calls:
        calls.write("x")
    if job.arm == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.arm == "exits":
        (job.folder / "output.txt").write_text("first\nthe last word\n")
        raise SystemExit(7)
    if job.arm == "waits":
        time.sleep(600)
    status = "failed" if job.arm == "fails" else "finished"
    write(job.result, job.record(status, epochs=[{"epoch": 1, "AP": 0.4}]))
