"""One run, in a process of its own: trained, evaluated, studied; told in one record."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.claims import inference
from benchmarks.claims.measuring import Clock, history, memory
from benchmarks.claims.results import Record
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


@dataclass(frozen=True)
class Job:
    """A run to do.

    Args:
        run, arms, code: see `Record`.
        recipe: with its seed.
        data: what the record says of the data.
        root: where the data lies.
        folder: of the run.
        device: ``cpu`` or ``cuda``.
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
            threads=self.threads,
            jobs=self.jobs,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **more,
        )


def begin(device: str, threads: int, output: Path) -> None:
    """Set up a process for work: what it prints goes to a file."""
    with open(output, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(threads)


def execute(job: Job) -> None:
    """Do a run and leave its record; the target of a process."""
    job.folder.mkdir(parents=True, exist_ok=True)
    begin(job.device, job.threads, job.folder / "output.txt")
    try:
        check_code(job.code)
        record = perform(job)
    except Exception as error:  # whatever it is, the other runs go on
        reason = f"{type(error).__name__}: {error}"
        print(reason, flush=True)
        record = job.record("failed", reason=reason)
    write(job.result, record)


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


def perform(job: Job) -> Record:
    """Train, or go on; then measure and study what was trained."""
    folder = job.folder / "training"
    resume = any((folder / "checkpoints").glob("step_*.safetensors"))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    train_set, val_set = load(job.root, job.recipe)
    recipe = job.recipe.for_classes(len(train_set.categories))
    clock = Clock(job.folder / "steps.jsonl", os.getppid())
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
    )
    model = trained.model
    lines = read_json_lines(folder / "log.jsonl")
    scores = [(line["epoch"], line["scores"]) for line in lines if "scores" in line]
    steps = [line for line in lines if "scores" not in line]
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    step_seconds, processor_seconds = clock.medians()
    record = job.record(
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
        memory=memory(model, recipe, train_set, device),
        rates=inference.rates(model, val_set, 16),
        inference=inference.study(model, val_set, recipe.max_detections, job.sample),
    )
    _tidy(folder)
    return record


def _tidy(folder: Path) -> None:
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
