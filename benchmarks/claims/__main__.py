"""The paper's claims, from nothing to the tables.

    python -m benchmarks.claims --preset smoke|cpu|gpu|coco [--only CLAIM …] [--dry-run]

Trains the arms of a preset, several at once, and keeps each finished run as a line of
``benchmarks/results/claims-PRESET.jsonl``.  Called again it goes on where it was: a finished run is
never repeated, one that was cut off continues from its last checkpoint.  Then it prints the tables,
draws the plots, and says of each claim whether it holds.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.claims import cost, limits, running
from benchmarks.claims.arms import Arm
from benchmarks.claims.backbone import prepare_backbone
from benchmarks.claims.data import describe
from benchmarks.claims.grid import COMPARISONS
from benchmarks.claims.jobs import Job
from benchmarks.claims.plots import draw
from benchmarks.claims.presets import PRESETS, Preset, chosen, cores, preset
from benchmarks.claims.results import Record, append, by_arm, latest, of_version, path_of, read
from benchmarks.claims.statements import CLAIMS
from benchmarks.claims.studies import studies
from benchmarks.claims.tables import failures, sheets
from benchmarks.claims.versions import fingerprint
from benchmarks.measure import argument_parser, wide_console
from detection.data import DataError

WORK = Path("runs") / "claims"


def named() -> dict[str, tuple[Arm, ...]]:
    """What ``--only`` takes: claims and comparisons, with their arms."""
    found = {claim.name: (claim.better.arm, claim.worse.arm) for claim in CLAIMS}
    return found | {c.name: tuple(row.arm for row in c.rows) for c in COMPARISONS}


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argument_parser(__doc__)
    sizes = "; ".join(f"{p.name}: {p.about}" for p in PRESETS.values())
    parser.add_argument("--preset", default="smoke", help=sizes)
    parser.add_argument("--data", type=Path, help="folder of the data (coco needs it)")
    parser.add_argument("--jobs", type=int, help="runs at once (as the preset says)")
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
        records, told = read(self.path)
        for text in told:
            self.console.print(text)
        version = every[0].code, every[0].data["digest"]
        counting, others = of_version(records, version, self.any_version)
        if others and tell:
            taken = "taken in" if self.any_version else "left out; --any-version takes them in"
            self.console.print(
                f"{others} result{'s are' if others > 1 else ' is'} of other code or data (this "
                f"is {version[0]} on {version[1]}): {taken} and marks them."
            )
        return counting

    def go(self, given: Path | None, dry: bool, retry: bool) -> None:
        """Do what is left to do."""
        size = self.size
        if size.data.kind != "folder" and not (given or size.data.default).exists():
            limits.check_disk(given or size.data.default, size.data.bytes, "The images")
            self.console.print(f"Composing {given or size.data.default} …")
        root = size.data.prepare(given)
        if size.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"The preset {size.name!r} needs a CUDA device, and there is none.")
        skip_empty = size.base(size.bases[0][0]).skip_empty
        data = describe(size.data, root, skip_empty)
        every = running.jobs_of(size, root, data, fingerprint(), self.work, self.jobs)
        records = self.records(every)
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
        console.print("Timing a few steps of each arm …")
        timings = cost.measure(left, self.jobs, self.work / "timings.json")
        minutes = {job.run: cost.minutes(job, timings[job.run]) for job in left}
        order = list(self.size.seeds)
        left.sort(key=lambda job: (order.index(job.recipe.seed), -minutes[job.run]))
        for run, timing in timings.items():
            arm = next(job.arm for job in left if job.run == run)
            console.print(
                f"  {arm}: {timing.step:.2f} s a step, {1e3 * timing.image:.0f} ms an image, "
                f"{cost.hours_text(minutes[run])} a run"
            )
        total = cost.wall([minutes[job.run] for job in left], self.jobs)
        peak = max(timing.peak for timing in timings.values())
        disk = cost.disk_needed(left, timings, self.jobs)
        console.print(
            f"About {cost.hours_text(total)} in all, {self.jobs * peak / 2**30:.1f} GiB of memory, "
            f"{disk / 2**30:.1f} GiB of disk."
        )
        limits.check_disk(self.work, disk, "The checkpoints")
        limits.check_memory(self.jobs * peak, self.size.device, self.jobs)
        if dry:
            return
        if self.size.teaching:
            first = left[0]
            prepare_backbone(
                first.root,
                first.recipe,
                self.size.teaching,
                Path(first.recipe.model.backbone.weights),
                torch.device(self.size.device),
                console,
            )
        if retry:
            for job in left:
                running.forget(job)
        done = 0
        waiting = [minutes[job.run] for job in left]
        began = cost.now()

        def ended(job: Job, record: Record) -> None:
            nonlocal done
            append(self.path, record)
            done += 1
            waiting.remove(minutes[job.run])
            rest = cost.wall(waiting, self.jobs) if waiting else 0.0
            what = f"AP {record.ap:.1f}" if record.finished else f"failed. {record.reason}"
            console.print(
                f"{cost.now() - began:.0f} min, {done} of {len(left)}: {job.arm}, seed "
                f"{job.recipe.seed}: {what}"
                + (f"; about {cost.hours_text(rest)} to go" if waiting else "")
            )

        running.run(left, self.jobs, ended)


def show(records: Sequence[Record], folder: Path, name: str, console: Console) -> None:
    """Print the tables and draw the plots of what there is."""
    found = by_arm(records)
    failed = [record for record in latest(records).values() if not record.finished]
    for sheet in (*sheets(found), *studies(found), failures(failed)):
        if sheet.rows:
            console.print(sheet.rich())
    if found:
        drawn = draw(found, folder, name)
        console.print(f"Plots: {', '.join(str(path) for path in drawn)}.")


def main() -> None:
    """Train, keep, show."""
    given = options().parse_args()
    size = chosen(preset(given.preset), tuple(given.only), named())
    jobs = size.jobs if given.jobs is None else given.jobs
    if jobs < 1:
        raise SystemExit(f"--jobs {jobs}: at least 1.")
    given.output.mkdir(parents=True, exist_ok=True)
    session = Session(size, jobs, given.output, WORK / size.name, wide_console(), given.any_version)
    try:
        with running.alone(session.work):
            session.go(given.data, given.dry_run, given.retry)
    except DataError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(
            "Stopped. Finished runs are kept; call again to go on from the last checkpoints."
        ) from None


if __name__ == "__main__":
    main()
