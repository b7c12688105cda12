"""Checkpoints: what goes in comes out, damage is named, and nothing good is ever lost."""

from __future__ import annotations

import os
import pickle
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from detection import checkpoints
from detection.checkpoints import (
    CheckpointError,
    CheckpointFolder,
    Resumable,
    load_training_state,
    load_weights,
    restore,
    save_checkpoint,
    training_path,
)
from detection.files import remove_leftovers
from detection.randomness import random_states, set_random_states


def metadata(step: int = 5) -> dict[str, Any]:
    return {
        "config": {"type": "Recipe", "steps": [1, 3]},
        "class_names": ["cat", "größer"],
        "category_ids": [17, 90],
        "step": step,
        "metrics": {"AP": 0.5, "AP_small": None},
    }


def state() -> dict[str, Any]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "random": [{"global": random_states()}],
        "best": float("-inf"),
        "epoch": 2,
        "average": None,
    }


def test_weights_and_metadata_come_back(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    weights = {
        "plain": base,
        "shared": base,
        "strided": base.t(),
        "expanded": torch.ones(1).expand(3),
        "half": base.half(),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    path = save_checkpoint(tmp_path / "new" / "a.safetensors", weights=weights, metadata=metadata())
    found, description = load_weights(path)
    assert description == metadata()
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name].equal(value)
        assert found[name].dtype == value.dtype
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.safetensors"]


def test_the_training_state_comes_back(tmp_path: Path) -> None:
    stored = state()
    path = save_checkpoint(
        tmp_path / "a.safetensors", weights={}, metadata=metadata(), training_state=stored
    )
    found = load_training_state(path)
    assert found.keys() == stored.keys()
    moments = stored["optimizer"]["state"][0]["exp_avg"]
    assert found["optimizer"]["state"][0]["exp_avg"].equal(moments)
    assert (found["best"], found["epoch"], found["average"]) == (float("-inf"), 2, None)
    set_random_states(found["random"][0]["global"])
    first = torch.rand(3)
    set_random_states(stored["random"][0]["global"])
    assert torch.rand(3).equal(first)


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """As on a full disk: the system refuses to write more than ``size`` bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["weights", "training state"])
def test_a_full_disk_leaves_the_previous_files_intact(tmp_path: Path, what: str) -> None:
    small, large = torch.ones(8), torch.ones(100_000)
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, weights={"w": small}, metadata=metadata(), training_state={"s": small})
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"could not be written.*Make room"):  # noqa: SIM117
        with no_file_beyond(50_000):
            save_checkpoint(
                path,
                weights={"w": large if what == "weights" else small},
                metadata=metadata(6),
                training_state={"s": large if what == "training state" else small},
            )
    after = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after[path] == before[path]
    assert load_training_state(path)["s"].equal(small)


def test_a_crash_before_the_rename_leaves_the_previous_file_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, weights={"w": torch.ones(2)}, metadata=metadata())

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, weights={"w": torch.zeros(2)}, metadata=metadata())
    assert load_weights(path)[0]["w"].tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"run/a\.safetensors could not be written"):
        save_checkpoint(tmp_path / "run" / "a.safetensors", weights={}, metadata=metadata())


def test_a_wrong_name_or_description_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in '\.safetensors'"):
        save_checkpoint(tmp_path / "a.pt", weights={}, metadata=metadata())
    with pytest.raises(ValueError, match="lacks config, step"):
        save_checkpoint(
            tmp_path / "a.safetensors",
            weights={},
            metadata={"class_names": [], "category_ids": [], "metrics": {}},
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("load", [load_weights, load_training_state])
def test_a_missing_file_is_named(tmp_path: Path, load: Any) -> None:
    with pytest.raises(CheckpointError, match=r"nothing.* does not exist"):
        load(tmp_path / "nothing.safetensors")


def test_a_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        load_weights(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path: Path, share: float) -> None:
    path = save_checkpoint(
        tmp_path / "a.safetensors",
        weights={"w": torch.randn(1000)},
        metadata=metadata(),
        training_state={"s": torch.randn(1000)},
    )
    for file in (path, training_path(path)):
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"a\.safetensors .*cut short or damaged"):
        load_weights(path)
    with pytest.raises(CheckpointError, match=r"a\.training\.pt is cut short or damaged"):
        load_training_state(path)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a.safetensors"
    torch.save({"format_version": 2, "state": Bomb(victim)}, training_path(path))
    with pytest.raises(CheckpointError, match="could run code"):
        load_training_state(path)
    path.write_bytes(pickle.dumps(Bomb(victim)))
    with pytest.raises(CheckpointError, match="may carry code"):
        load_weights(path)
    assert not victim.exists()


def test_weights_without_description_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="lacks config, class_names, category_ids, step"):
        load_weights(tmp_path / "a.safetensors")


def test_other_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 99)
    monkeypatch.setattr(checkpoints, "TRAINING_VERSION", 99)
    path = save_checkpoint(
        tmp_path / "a.safetensors", weights={}, metadata=metadata(), training_state={}
    )
    monkeypatch.undo()
    for load in (load_weights, load_training_state):
        with pytest.raises(CheckpointError, match=r"format version 99; .* reads [12]"):
            load(path)


def test_something_else_is_not_a_training_state(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.training.pt")
    with pytest.raises(CheckpointError, match="format version None"):
        load_training_state(tmp_path / "a.safetensors")


def test_a_model_is_restored(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    path = save_checkpoint(
        tmp_path / "a.safetensors", weights=model.state_dict(), metadata=metadata()
    )
    restore(other, load_weights(path)[0])
    assert other.weight.equal(model.weight)
    assert other.bias.equal(model.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "missing: bias"),
        ({"more": torch.ones(1)}, "unknown: more"),
        ({"weight": torch.ones(2, 4)}, r"other shape: weight \(2, 4\) where .* \(2, 3\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(
    change: dict[str, Tensor | None], message: str
) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    changed = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), **change}
    with pytest.raises(CheckpointError, match=message):
        restore(model, {k: v for k, v in changed.items() if v is not None})
    assert model.weight.equal(before)


def save(folder: CheckpointFolder, step: int, score: float | None) -> Path:
    weights = {"w": torch.full((2,), float(step))}
    return folder.save(
        weights=weights, metadata=metadata(step), training_state={"step": step}, score=score
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def found(folder: CheckpointFolder) -> Resumable:
    resumable = folder.resume()
    assert resumable is not None
    return resumable


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run", keep=2)
    assert folder.resume() is None
    for step, score in ((10, 0.2), (20, 0.6), (30, None), (1000, 0.5)):
        assert save(folder, step, score) == found(folder).path
    assert names(tmp_path / "run") == [
        "best.safetensors",
        "step_000030.safetensors",
        "step_000030.training.pt",
        "step_001000.safetensors",
        "step_001000.training.pt",
    ]
    assert load_weights(folder.best)[0]["w"].tolist() == [20, 20]
    assert found(folder).state["step"] == 1000


def test_the_best_score_outlives_the_process(tmp_path: Path) -> None:
    save(CheckpointFolder(tmp_path), 10, 0.6)
    folder = CheckpointFolder(tmp_path)
    found(folder)
    assert folder.best_score == 0.6
    save(folder, 20, 0.5)
    assert load_weights(folder.best)[1]["step"] == 10


def test_what_was_just_written_is_never_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 100, None)
    assert save(folder, 50, None).exists()


@pytest.mark.parametrize("damage", ["cut short", "empty", "missing"])
def test_a_damaged_training_state_is_passed_over_told_and_set_aside(
    tmp_path: Path, damage: str
) -> None:
    """The run goes on from the one before; what could be read of the newer one is not lost."""
    folder = CheckpointFolder(tmp_path)
    save(folder, 10, 0.5)
    newest = training_path(save(folder, 20, 0.7))
    if damage == "missing":
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[:500] if damage == "cut short" else b"")
    again = CheckpointFolder(tmp_path)
    resumable = found(again)
    assert (resumable.path.name, resumable.state["step"]) == ("step_000010.safetensors", 10)
    assert len(resumable.passed) == 1 and "step_000020.training.pt" in resumable.passed[0]
    assert again.best_score == 0.5
    assert "step_000020.safetensors.aside" in names(tmp_path)
    # Neither is in the way of what follows.
    for step in (11, 12):
        save(again, step, None)
    assert found(CheckpointFolder(tmp_path)).state["step"] == 12
    assert again.keep == len(list(tmp_path.glob("step_*.training.pt")))


def test_no_whole_checkpoint_is_an_error_that_names_each(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20):
        training_path(save(folder, step, None)).write_bytes(b"no")
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match=r"No checkpoint .* is whole.*000020.*000010"):
        CheckpointFolder(tmp_path).resume()
    assert names(tmp_path) == before


@pytest.mark.parametrize("what", ["weights", "best", "nothing"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "older"])
def test_what_should_have_followed_the_training_state_is_made_up_for(
    tmp_path: Path, what: str, damage: str
) -> None:
    """A run that is killed after its training state has lost nothing."""
    folder = CheckpointFolder(tmp_path)
    save(folder, 10, 0.5)
    path = save(folder, 20, 0.7)
    files = {"weights": [path], "best": [folder.best], "nothing": []}[what]
    wanted = {p.name: repr(load_weights(p)) for p in tmp_path.glob("*.safetensors")}
    for file in files:
        if damage == "missing":
            file.unlink()
        elif damage == "cut short":
            file.write_bytes(file.read_bytes()[:-1])
        else:
            file.write_bytes((tmp_path / "step_000010.safetensors").read_bytes())
    again = CheckpointFolder(tmp_path)
    told = again.complete(found(again), {"w": torch.full((2,), 20.0)})
    assert {p.name: repr(load_weights(p)) for p in tmp_path.glob("*.safetensors")} == wanted
    assert len(told) == len(files)
    assert all(file.name in text for file, text in zip(files, told, strict=True))


def test_lost_best_weights_are_told(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 10, 0.5)
    save(folder, 20, 0.4)
    folder.best.unlink()
    again = CheckpointFolder(tmp_path)
    (told,) = again.complete(found(again), {"w": torch.full((2,), 20.0)})
    assert "best.safetensors is missing" in told


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = save_checkpoint(
            tmp_path / "a.safetensors", weights={}, metadata=metadata(), training_state={}
        )
    finally:
        os.umask(before)
    for file in (path, training_path(path)):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ["best.safetensors", ".hidden", ".notes.partial.txt", "step_000001.training.pt"]
    for name in (*kept, ".best.123.partial.safetensors", ".log.9.partial.jsonl", ".x.1.partial"):
        (tmp_path / name).touch()
    assert len(remove_leftovers(tmp_path)) == 3
    assert names(tmp_path) == sorted(kept)
    assert remove_leftovers(tmp_path / "nowhere") == []
