"""A run that is interrupted, in whatever way, and resumed ends as if it had not been."""

from __future__ import annotations

import errno
import io
import json
import random
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_runs import KINDS, differences, kill_and_resume, moment, small_recipe
from rich.console import Console

from detection import checkpoints
from detection.checkpoints import CheckpointError, load_training_state, training_path
from detection.data import compose_digits, load_coco_folder
from detection.data.transforms import eval_transform, train_transform
from detection.distributed import Distributed
from detection.training import loop
from detection.training.loop import Trained, TrainingError, train
from detection.training.recipe import Recipe


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compose_digits(
        tmp_path_factory.mktemp("data") / "digits", train_images=24, val_images=8, size=64
    )


def run(recipe: Recipe, root: Path, folder: Path, **options: Any) -> tuple[Trained, str]:
    """Train; also what was said."""
    sets = load_coco_folder(
        root, train_transform(recipe.augmentation), eval_transform(recipe.augmentation)
    )
    said = io.StringIO()
    options.setdefault("console", Console(file=said, width=10_000))
    return train(recipe, *sets, folder, **options), said.getvalue()


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(small_recipe(), digits, folder)
    return folder


class Stop(Exception):
    """Raised where a run is to be interrupted."""


def interrupted(
    digits: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, **changes: Any
) -> None:
    """Leave a run that was interrupted at the beginning of a step, and saved before it."""
    original = loop.Step.__call__

    def stopping(self: loop.Step, batch: Any) -> dict[str, float]:
        if self.count == step:
            raise Stop
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Step, "__call__", stopping)
        with pytest.raises(Stop):
            run(small_recipe(**changes), digits, folder)


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (3, 0), (5, 2)])
def test_a_run_goes_on_at_exactly_the_next_batch(
    whole: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    workers: int,
) -> None:
    """Inside an epoch and at its border; workers change nothing, and may change on resuming."""
    folder = tmp_path / "run"
    interrupted(digits, folder, monkeypatch, step, workers=workers)
    _, said = run(small_recipe(), digits, folder, resume=True)
    assert f"Resumed after step {step} of 6" in said
    stored = ("config", "metadata")  # which say how many workers there were
    found = differences(whole, folder)
    assert [name for name in found if not any(word in name for word in stored)] == []


@pytest.mark.fault(21)
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_same_bits(
    whole: Path, digits: Path, tmp_path: Path, kind: str
) -> None:
    """Fault 21: killed at a random moment, in the midst of a save, or between two files.

    Expected: resumed, it ends with the same bits as a run that was not killed.
    """
    chance = random.Random(kind)
    folder, seconds = tmp_path / "run", 3.0
    first = moment(kind, 2, seconds, chance)
    assert kill_and_resume(small_recipe(), digits, folder, first, seconds, chance) in (1, 2)
    assert not differences(whole, folder)


def test_what_the_evaluation_decides_is_decided_again(
    whole: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted when the scores are known and not yet saved: they are logged once."""
    folder = tmp_path / "run"

    def fail(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(small_recipe(), digits, folder, on_evaluation=fail)
    assert '"scores"' in (folder / "log.jsonl").read_text()
    run(small_recipe(), digits, folder, resume=True)
    assert not differences(whole, folder)


def test_a_finished_run_is_evaluated_again_and_left_as_it_is(whole: Path, digits: Path) -> None:
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != "run.json"}
    trained, _ = run(small_recipe(), digits, whole, resume=True)
    logged = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])
    assert trained.scores.AP == logged["scores"]["AP"]
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize("damage", ["training state", "both", "weights"])
def test_a_damaged_checkpoint_costs_no_more_than_the_way_from_the_one_before(
    whole: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = tmp_path / "run"
    interrupted(digits, folder, monkeypatch, 5)
    path = folder / "checkpoints" / "step_000005.safetensors"
    if damage != "training state":
        path.write_bytes(path.read_bytes()[:-100])
    if damage != "weights":
        state = training_path(path)
        state.write_bytes(state.read_bytes()[:-100])
    _, said = run(small_recipe(), digits, folder, resume=True)
    found = differences(whole, folder)
    if damage == "weights":
        assert "step_000005.safetensors was missing, damaged or outdated: written again" in said
    else:
        assert "step_000005.training.pt is cut short or damaged" in said
        assert "It is passed over" in said
        assert "Resumed after step 4" in said
        assert len(list(folder.rglob("*.aside"))) == 2
        found = [difference for difference in found if not difference.startswith("files ")]
    assert not found


def test_the_first_checkpoint_is_written_before_the_first_step(
    whole: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    interrupted(digits, folder, monkeypatch, 0)
    run(small_recipe(), digits, folder, resume=True)
    assert not differences(whole, folder)


def test_a_run_killed_as_it_began_is_no_run(digits: Path, tmp_path: Path) -> None:
    """Its folder, which holds half a file, is taken for a new run; there is nothing to resume."""
    checkpoints_of = tmp_path / "run" / "checkpoints"
    checkpoints_of.mkdir(parents=True)
    (checkpoints_of / ".step_000000.training.17.partial.pt").write_bytes(b"half")
    recipe = replace(small_recipe(), optimization=replace(small_recipe().optimization, epochs=1))
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        run(recipe, digits, tmp_path / "run", resume=True)
    run(recipe, digits, tmp_path / "run")
    assert not list(checkpoints_of.glob(".*"))


def refuse_with_limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def refuse_with_error(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    return lambda: monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize("refuse", [refuse_with_limit, refuse_with_error])
def test_a_full_disk_ends_the_run_which_can_be_resumed(
    whole: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[pytest.MonkeyPatch], Callable[[], None]],
) -> None:
    """In the midst of the second epoch; what was written before is whole."""
    folder, original = tmp_path / "run", loop.Step.__call__
    undo: list[Callable[[], None]] = []

    def filling(self: loop.Step, batch: Any) -> dict[str, float]:
        if self.count == 4:
            undo.append(refuse(monkeypatch))
        return original(self, batch)

    monkeypatch.setattr(loop.Step, "__call__", filling)
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*Make room on the disk"):
            run(small_recipe(), digits, folder)
    finally:
        for call in undo:
            call()
    monkeypatch.setattr(loop.Step, "__call__", original)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert "step_000004.training.pt" in kept
    assert not [name for name in kept if "partial" in name or "000005.training" in name]
    run(small_recipe(), digits, folder, resume=True)
    assert not differences(whole, folder)


def test_a_log_that_cannot_be_written_is_named(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    folder = tmp_path / "run"
    interrupted(digits, folder, monkeypatch, 0)
    (folder / "log.jsonl").unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        opened = open
        patch.setattr(
            "builtins.open",
            lambda path, *rest, **more: opened(
                "/dev/full" if str(path).endswith("log.jsonl") else path, *rest, **more
            ),
        )
        with pytest.raises(OSError, match=r"No space left on device. Make room.*log\.jsonl"):
            run(small_recipe(), digits, folder, resume=True)


def test_only_the_same_run_is_resumed(
    whole: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recipe, data, or number of processes is refused, and nothing is changed."""
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(TrainingError, match="another configuration"):
        run(small_recipe(average=0.5), digits, whole, resume=True)
    larger = compose_digits(tmp_path / "digits", train_images=25, val_images=8, size=64)
    with pytest.raises(TrainingError, match="trained on 24 images and there are 25"):
        run(small_recipe(), larger, whole, resume=True)
    path = whole / "checkpoints" / "step_000006.safetensors"
    state = load_training_state(path)
    monkeypatch.setattr(
        loop, "load_training_state", lambda _: {**state, "random": state["random"] * 2}
    )
    with pytest.raises(TrainingError, match="written by 2 processes and there are 1 now"):
        run(small_recipe(), digits, whole, resume=True)
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}


def test_another_device_is_told(whole: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = whole / "checkpoints" / "step_000006.safetensors"
    state = load_training_state(path)
    monkeypatch.setattr(loop, "load_training_state", lambda _: {**state, "device": "cuda"})
    _, said = run(small_recipe(), digits, whole, resume=True)
    assert "the run was on cuda and goes on on cpu: it will not end with the same bits" in said


def test_checkpoints_inside_an_epoch_are_written_when_the_main_process_says(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its clock, not by that of each process."""
    saved: list[int] = []
    original = loop._Run.save

    def save(self: Any, scores: Any = None) -> None:
        saved.append(self.step.count)
        original(self, scores)

    monkeypatch.setattr(loop._Run, "save", save)
    answers = iter([False, True] * 6)
    asked: list[bool] = []

    def agree(self: Distributed, flag: bool) -> bool:
        asked.append(flag)
        return next(answers)

    monkeypatch.setattr(Distributed, "agree", agree)
    recipe = replace(small_recipe(), save_minutes=1e6)
    recipe = replace(recipe, optimization=replace(recipe.optimization, epochs=1))
    run(recipe, digits, tmp_path / "run")
    assert asked == [False, False]
    assert saved == [0, 2, 3, 3]


def test_a_checkpoint_of_an_earlier_version_is_refused_with_a_sentence(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "TRAINING_VERSION", 1)
        interrupted(digits, tmp_path / "run", monkeypatch, 0)
    with pytest.raises(CheckpointError, match="format version 1; this version .* reads 2"):
        run(small_recipe(), digits, tmp_path / "run", resume=True)
