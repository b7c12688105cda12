"""The paper's claims, from nothing to the tables.

    python -m benchmarks.claims --preset smoke|cpu|gpu|coco [--only CLAIM …] [--dry-run]

Trains the arms of a preset, several at once, and keeps each finished run as a line of
``benchmarks/results/claims-PRESET.jsonl`` (smoke, which decides nothing: in ``runs/claims/smoke``).
Called again it goes on where it was: a finished run is never repeated, one that was cut off
continues from its last checkpoint.  Then it prints the tables, draws the plots, and says of each
claim whether it holds.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.claims import cost, limits, running
from benchmarks.claims.arms import Arm
from benchmarks.claims.backbone import prepare_backbone
from benchmarks.claims.data import describe
from benchmarks.claims.former import as_now
from benchmarks.claims.grid import COMPARISONS
from benchmarks.claims.jobs import Job, left_behind
from benchmarks.claims.plots import draw
from benchmarks.claims.presets import PRESETS, Preset, chosen, cores, preset
from benchmarks.claims.processes import alone
from benchmarks.claims.results import (
    Record,
    append,
    by_arm,
    latest,
    of_version,
    path_of,
    read,
    repair,
)
from benchmarks.claims.statements import CLAIMS
from benchmarks.claims.studies import studies
from benchmarks.claims.tables import failures, sheets
from benchmarks.claims.versions import fingerprint
from benchmarks.measure import argument_parser, wide_console
from detection.data import DataError

WORK = Path("runs") / "claims"
RESULTS = Path(__file__).parents[1] / "results"


def named() -> dict[str, tuple[Arm, ...]]:
    """What ``--only`` takes: claims and comparisons, with their arms."""
    found = {claim.name: (claim.better.arm, claim.worse.arm) for claim in CLAIMS}
    return found | {c.name: tuple(row.arm for row in c.rows) for c in COMPARISONS}


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.set_defaults(output=None)  # it depends on the preset
    sizes = "; ".join(f"{p.name}: {p.about}" for p in PRESETS.values())
    parser.add_argument("--preset", default="smoke", help=sizes)
    parser.add_argument("--data", type=Path, help="folder of the data (coco needs it)")
    parser.add_argument("--jobs", type=int, help="runs at once (as the preset says, on each GPU)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="CLAIM",
        help=f"arms of these claims or tables alone: {', '.join(named())}",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and end")
    parser.add_argument("--retry", action="store_true", help="try failed runs again")
    parser.add_argument(
        "--any-version", action="store_true", help="take results of other code or data in, marked"
    )
    return parser


@dataclass
class Session:
    """One call of the command.

    Attributes:
        size: the preset, perhaps with fewer arms.
        jobs: runs at once.
        output: folder of the results.
        work: folder of the runs.
    """

    size: Preset
    jobs: int
    output: Path
    work: Path
    console: Console
    any_version: bool = False

    @property
    def path(self) -> Path:
        """The results."""
        return path_of(self.output, self.size.name)

    def records(self, every: Sequence[Job], tell: bool = True) -> list[Record]:
        """The results that count; what is damaged or of another version is told."""
        read_now, told = read(self.path)
        for text in told:
            self.say(text)
        records = [as_now(record, self.size) for record in read_now]
        version = every[0].code, every[0].data["digest"]
        counting, others = of_version(records, version, self.any_version)
        if others and tell:
            taken = "taken in" if self.any_version else "left out; --any-version takes them in"
            self.console.print(
                f"{others} result{'s are' if others > 1 else ' is'} of other code or data (this "
                f"is {version[0]} on {version[1]}): {taken} and marks them."
            )
        if tell and (count := sum("code" in record.versions for record in counting)):
            self.console.print(
                f"{count} result{'s are' if count > 1 else ' is'} of former code that trains to "
                "the same bits (benchmarks.claims.former), and counted."
            )
        return counting

    def say(self, text: str) -> None:
        """Print what may hold anything, such as an error: brackets are no markup in it."""
        self.console.print(text, markup=False)

    def keep(self, job: Job, record: Record) -> None:
        """Add a result; the other runs go on where that cannot be."""
        try:
            append(self.path, record)
        except (OSError, ValueError) as error:
            self.say(
                f"{self.path} could not be written ({error}). What {called(job)} has left in "
                f"{job.folder} stays there, and the next call goes on from it."
            )

    def take_in(
        self, every: Sequence[Job], records: Sequence[Record], dry: bool = False
    ) -> list[Record]:
        """What runs have left that is not among the results: it is added, and given back."""
        found = []
        for job in running.remaining(every, records, retry=False):
            record = left_behind(job)
            if record is not None:
                found.append(record)
                if not dry:
                    self.keep(job, record)
        if found:
            runs = "1 run has" if len(found) == 1 else f"{len(found)} runs have"
            self.say(f"{runs} ended and could not be written down then: taken in.")
        return found

    def go(self, given: Path | None, dry: bool, retry: bool) -> None:
        """Do what is left to do."""
        size = self.size
        if size.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"The preset {size.name!r} needs a CUDA device, and there is none.")
        if size.data.kind != "folder" and not (given or size.data.default).exists():
            limits.check_disk(given or size.data.default, size.data.bytes, "The images")
            self.console.print(f"Composing {given or size.data.default} …")
        root = size.data.prepare(given)
        skip_empty = size.base(size.bases[0][0]).skip_empty
        data = describe(size.data, root, skip_empty)
        every = running.jobs_of(size, root, data, fingerprint(), self.work, self.jobs)
        if not dry:
            for text in repair(self.path):
                self.say(text)
        records = self.records(every)
        records += self.take_in(every, records, dry)
        left = running.remaining(every, records, retry)
        self.console.print(
            f"{size.name}: {len(every)} runs of {len({job.run for job in every})} arms and "
            f"{len(size.seeds)} seeds on {data['train_images']} images, {self.jobs} at once; "
            f"{len(every) - len(left)} of them done, {len(left)} to do."
        )
        failed = [record for record in latest(records).values() if not record.finished]
        if failed and not retry:
            self.console.print(f"{len(failed)} of those done failed; --retry tries them again.")
        if left:
            self.do(left, dry, retry)
        if not dry:
            self.take_in(every, self.records(every, tell=False))
            wanted = {job.run for job in every}
            counting = [
                record for record in self.records(every, tell=False) if record.run in wanted
            ]
            show(counting, self.output, size.name, self.console)

    def do(self, left: list[Job], dry: bool, retry: bool) -> None:
        """Say what is left will take; then do it."""
        console = self.console
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if busy > cores():
            console.print(
                f"The machine is busy ({busy:.1f} processes for {cores()} cores): times are those "
                "beside that work."
            )
        left, timings = self.timed(left, dry)
        if not left:
            return
        minutes = {
            job.folder: cost.minutes(job, timings[job.run], job.steps_done()) for job in left
        }
        order = list(self.size.seeds)
        left.sort(key=lambda job: (order.index(job.recipe.seed), -minutes[job.folder]))
        self.estimate(left, timings, list(minutes.values()))
        if dry:
            return
        if self.size.teaching:
            first = left[0]
            prepare_backbone(
                first.root,
                first.recipe,
                self.size.teaching,
                backbone_of(first),
                torch.device(self.size.device),
                console,
            )
        if retry:
            for job in left:
                running.forget(job)
        done = 0
        waiting = [minutes[job.folder] for job in left]
        began = cost.now()

        def ended(job: Job, record: Record) -> None:
            nonlocal done
            self.keep(job, record)
            done += 1
            waiting.remove(minutes[job.folder])
            rest = cost.wall(waiting, self.jobs) if waiting else 0.0
            what = f"AP {record.ap:.1f}" if record.finished else f"failed. {record.reason}"
            self.say(
                f"{cost.now() - began:.0f} min, {done} of {len(left)}: {called(job)}: {what}"
                + (f"; about {cost.hours_text(rest)} to go" if waiting else "")
            )

        running.run(left, self.jobs, ended)

    def timed(self, left: Sequence[Job], dry: bool) -> tuple[list[Job], dict[str, cost.Timing]]:
        """The jobs that could be timed, with the timings by run; the others are kept as failed."""
        self.console.print("Timing a few steps of each arm …")
        timings, reasons = cost.measure(left, self.jobs, self.work / "timings.json")
        for job in left:
            if job.run in reasons:
                reason = f"A few steps were to be timed. {reasons[job.run]}"
                self.say(f"  {called(job)}: failed. {reason}")
                if not dry:
                    self.keep(job, job.record("failed", reason=reason))
        return [job for job in left if job.run in timings], timings

    def estimate(
        self, left: Sequence[Job], timings: Mapping[str, cost.Timing], minutes: Sequence[float]
    ) -> None:
        """Say what the jobs will take, which have so many minutes to go.

        Raises:
            SystemExit: if there is no room for it.
        """
        for run, timing in timings.items():
            job = next(job for job in left if job.run == run)
            self.console.print(
                f"  {job.arm}: {timing.step:.2f} s a step, {1e3 * timing.image:.0f} ms an image, "
                f"{cost.hours_text(cost.minutes(job, timing))} a run"
            )
        total = cost.wall(minutes, self.jobs)
        cards = max(1, torch.cuda.device_count()) if self.size.device == "cuda" else 1
        beside = -(-self.jobs // cards)
        peak = max(timing.peak for timing in timings.values())
        host = max(timing.host for timing in timings.values())
        disk = cost.disk_needed(left, timings, self.jobs)
        teaching = self.size.teaching and not backbone_of(left[0]).exists()
        self.console.print(
            f"About {cost.hours_text(total)} in all, {self.jobs * peak / 2**30:.1f} GiB of memory, "
            f"{disk / 2**30:.1f} GiB of disk; not counted is the start of each process"
            + (", and that a backbone is taught first." if teaching else ".")
        )
        limits.check_disk(self.work, disk, "The checkpoints")
        limits.check_memory(beside * peak, self.size.device, beside, cards)
        if self.size.device == "cuda":
            limits.check_memory(self.jobs * host, "cpu", self.jobs)


def called(job: Job) -> str:
    """What a run is called."""
    return f"{job.arm}, seed {job.recipe.seed}"


def backbone_of(job: Job) -> Path:
    """The weights that a job's backbone begins from."""
    return Path(job.recipe.model.backbone.weights)


def lacking(size: Preset, names: Sequence[str]) -> Iterator[str]:
    """Of claims and tables that were asked for: which of their arms are not run at this size."""
    there = {name for same in size.runs().values() for name in same}
    for name in names:
        missing = dict.fromkeys(arm.name for arm in named()[name] if arm.name not in there)
        if missing:
            yield (
                f"{name}: the preset {size.name!r} has no run of {', '.join(missing)}, so what "
                "compares with it stays open. Choose a larger preset."
            )


def at_once(size: Preset) -> int:
    """Runs at once: as many as the preset says, on each GPU if there are cores for them."""
    if size.device == "cpu":
        return size.jobs
    return max(size.jobs, min(size.jobs * torch.cuda.device_count(), cores()))


def show(records: Sequence[Record], folder: Path, name: str, console: Console) -> None:
    """Print the tables and draw the plots of what there is."""
    found = by_arm(records)
    failed = [record for record in latest(records).values() if not record.finished]
    for sheet in (*sheets(found, failed), *studies(found), failures(failed)):
        if sheet.rows:
            console.print(sheet.rich())
    if found:
        drawn = draw(found, folder, name)
        console.print(f"Plots: {', '.join(str(path) for path in drawn)}.")


def main() -> None:
    """Train, keep, show."""
    given = options().parse_args()
    size = chosen(preset(given.preset), tuple(given.only), named())
    jobs = at_once(size) if given.jobs is None else given.jobs
    if jobs < 1:
        raise SystemExit(f"--jobs {jobs}: at least 1.")
    work = WORK / size.name
    output = given.output or (work if size.name == "smoke" else RESULTS)
    session = Session(size, jobs, output, work, wide_console(), given.any_version)
    for text in lacking(size, given.only):
        session.say(text)
    try:
        # Two commands in two folders may have one folder of results.
        with alone(work), alone(output, f".{session.path.name}.lock"):
            session.go(given.data, given.dry_run, given.retry)
    except DataError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(
            f"A file could not be read or written ({error}). Finished runs are kept: mend that, "
            "and call again to go on."
        ) from None
    except KeyboardInterrupt:
        raise SystemExit(
            "Stopped. Finished runs are kept; call again to go on from the last checkpoints."
        ) from None


if __name__ == "__main__":
    main()
