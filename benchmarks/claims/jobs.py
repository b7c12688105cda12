"""One run, in a process of its own: trained, evaluated, studied; told in one record."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.claims import inference
from benchmarks.claims.measuring import Clock, history, memory
from benchmarks.claims.processes import end_with_parent, in_turn
from benchmarks.claims.results import Record, parsed
from benchmarks.claims.versions import fingerprint
from benchmarks.measure import machine, provenance
from detection.checkpoints import training_path
from detection.configuration import to_json
from detection.data import eval_transform, load_coco_folder, train_transform
from detection.data.coco import CocoDataset
from detection.distributed import Distributed
from detection.evaluation import METRICS
from detection.files import replacing
from detection.training.loop import train
from detection.training.progress import read_json_lines
from detection.training.recipe import Recipe

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """A run to do.

    Args:
        run, arms, code: see `Record`.
        recipe: with its seed.
        data: what the record says of the data.
        root: where the data lies.
        folder: of the run.
        device: ``cpu``, ``cuda``, or one card, such as ``cuda:1``.
        threads, jobs: of the run, and how many run beside each other.
        sample: images for the closer look.
    """

    run: str
    arms: tuple[str, ...]
    code: str
    recipe: Recipe
    data: dict[str, Any]
    root: Path
    folder: Path
    device: str
    threads: int
    jobs: int
    sample: int

    @property
    def arm(self) -> str:
        """What it is called."""
        return self.arms[0]

    @property
    def result(self) -> Path:
        """Where the record of the run is left."""
        return self.folder / "record.json"

    def steps_done(self) -> int:
        """About how many steps need not be done again: those of the log of a run to resume."""
        if not resumable(self.folder / "training"):
            return 0
        try:
            lines = read_json_lines(self.folder / "training" / "log.jsonl")
        except (OSError, ValueError):
            return 0
        return max((int(line["step"]) for line in lines), default=0)

    def record(self, status: str, **more: Any) -> Record:
        """A record of what the job is."""
        return Record(
            run=self.run,
            arms=list(self.arms),
            seed=self.recipe.seed,
            status=status,  # type: ignore[arg-type]
            code=self.code,
            data=self.data,
            recipe=to_json(self.recipe),
            versions=provenance("claims")["versions"],
            device=machine(),
            place=torch.device(self.device).type,
            commit=commit(),
            threads=self.threads,
            jobs=self.jobs,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **more,
        )


def on_card(job: Job, place: int) -> Job:
    """The job on one of the GPUs that there are, by its place; as it is where it needs none."""
    if job.device != "cuda":
        return job
    return replace(job, device=f"cuda:{place % max(1, torch.cuda.device_count())}")


def begin(device: str, threads: int, output: Path) -> None:
    """Set up a process for work: what it prints goes to a file, and it ends with its parent."""
    end_with_parent()
    with open(output, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        torch.cuda.set_device(device)
    torch.set_num_threads(threads)


def execute(job: Job) -> None:
    """Do a run and leave its record; the target of a process."""
    job.folder.mkdir(parents=True, exist_ok=True)
    begin(job.device, job.threads, job.folder / "output.txt")
    # A run of a command that was killed may need a moment to notice, and may even be done by then.
    with in_turn(job.folder / "lock"):
        if left_behind(job) is None:
            finish(job)


def finish(job: Job) -> None:
    """Do a run and leave its record, in this process.

    Raises:
        SystemExit: if the record cannot be written.
    """
    try:
        check_code(job.code)
        commit()  # as it is now
        record = perform(job)
    except Exception as error:  # whatever it is, the other runs go on
        record = job.record("failed", reason=f"{type(error).__name__}: {error}")
        say(record.reason)
    try:
        write(job.result, record)
    except OSError as error:
        what = record.reason or "The run is done."
        say(f"{what} Its record could not be written ({error}): make room, and add --retry.")
        raise SystemExit(1) from None
    if record.finished:  # only now: until then the run may have to go on
        tidy(job.folder / "training")


def say(text: str) -> None:
    """Print, if there is still room for it."""
    with suppress(OSError):
        print(text, flush=True)


def check_code(wanted: str) -> None:
    """Refuse to run another code than the one that the results will be taken for.

    Raises:
        RuntimeError: if files have changed since the command was begun.
    """
    if fingerprint() != wanted:
        raise RuntimeError(
            f"The code has changed since this command was begun, from {wanted} to {fingerprint()}. "
            "Call it again, or bring the code back and add --retry."
        )


def write(path: Path, record: Record) -> None:
    """Leave a record for the process that collects them; it is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")


def left_behind(job: Job) -> Record | None:
    """The record that a job has left in its folder, if it has."""
    try:
        found = parsed(job.result.read_bytes() + b"\n")
    except OSError:
        return None
    return found if isinstance(found, Record) else None


@cache
def commit() -> str:
    """What is checked out, with ``-dirty`` where files differ from it; empty where git is not."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def digest_of_weights(path: str) -> str:
    """SHA-256 of the file that a backbone begins from; empty where there is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def resumable(folder: Path) -> bool:
    """Whether a training can go on: weights alone do not suffice."""
    return any((folder / "checkpoints").glob("step_*.training.pt"))


def perform(job: Job) -> Record:
    """Train, or go on; then measure and study what was trained."""
    folder = job.folder / "training"
    resume = resumable(folder)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        (job.folder / "steps.jsonl").unlink(missing_ok=True)
    train_set, val_set = load(job.root, job.recipe)
    recipe = job.recipe.for_classes(len(train_set.categories))
    clock = Clock(job.folder / "steps.jsonl")
    device = Distributed(device=torch.device(job.device))
    trained = train(
        recipe,
        train_set,
        val_set,
        folder,
        distributed=device,
        resume=resume,
        console=Console(quiet=True),
        trackers=[clock],
        about={"backbone": digest_of_weights(recipe.model.backbone.weights)},
    )
    model = trained.model
    lines = read_json_lines(folder / "log.jsonl")
    scores = [(line["epoch"], line["scores"]) for line in lines if "scores" in line]
    steps = [line for line in lines if "scores" not in line]
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    step_seconds, processor_seconds = clock.medians()
    with in_turn(job.folder.parent / "rates.lock"):  # no two at once: they would slow each other
        rates = inference.rates(model, val_set, 16)
    return job.record(
        "finished",
        parameters=sum(p.numel() for p in model.parameters()),
        epochs=[
            {"epoch": epoch, **{name: plain(found[name]) for name in METRICS}}
            for epoch, found in scores
        ],
        per_class={name: plain(value) for name, value in scores[-1][1]["per_class"].items()},
        history=history(steps),
        step_seconds=step_seconds,
        step_processor_seconds=processor_seconds,
        training_minutes=step_seconds * len(steps) / 60,
        resumed=len(run.get("resumed", [])),
        backbone=run.get("backbone", ""),
        memory=memory(model, recipe, train_set, device),
        rates=rates,
        inference=inference.study(model, val_set, recipe.max_detections, job.sample),
    )


def tidy(folder: Path) -> None:
    """Keep the weights that were evaluated last, and nothing that only goes on needs."""
    kept = sorted((folder / "checkpoints").glob("step_*.safetensors"))
    for path in kept:
        training_path(path).unlink(missing_ok=True)
    for path in (*kept[:-1], folder / "checkpoints" / "best.safetensors"):
        path.unlink(missing_ok=True)


def load(root: Path, recipe: Recipe) -> tuple[CocoDataset, CocoDataset]:
    """Both sets, as the recipe sees them."""
    augmentation = recipe.augmentation
    return load_coco_folder(
        root,
        train_transform(augmentation),
        eval_transform(augmentation),
        skip_empty=recipe.skip_empty,
    )


def plain(value: Any) -> float | None:
    """A figure for JSON, which has no NaN."""
    number = float(value)
    return round(number, 6) if number == number else None
