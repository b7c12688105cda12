"""Trackers: what they are given is what they show."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detection.training.tracking import TensorBoard, WeightsAndBiases

STEP = {"step": 3, "epoch": 0, "loss": 2.5, "gradient_norm": math.inf}
SCORES = {
    "step": 3,
    "epoch": 1,
    "scores": {"type": "CocoScores", "AP": 0.25, "AP_small": math.nan, "max_detections": 100}
    | {"per_class": {"cat": 0.5, "dog": math.nan}},
}
WANTED = {"train/loss": 2.5, "val/AP": 0.25, "class/cat": 0.5}


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_shows_what_is_finite(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = TensorBoard(tmp_path)
    tracker.write(STEP)
    tracker.write(SCORES)
    tracker.close()
    found = events(tmp_path)
    assert {tag: values[-1] for tag, values in found.items() if tag != "epoch"} == {
        tag: (3, value) for tag, value in WANTED.items()
    }


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for steps in ((1, 2, 3), (2, 3, 4)):
        tracker = TensorBoard(tmp_path)
        for step in steps:
            tracker.write({"step": step, "epoch": 0, "loss": float(10 * step)})
        tracker.close()
    assert [step for step, _ in events(tmp_path)["train/loss"]] == [1, 2, 3, 4]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A module in the place of wandb, and what was asked of it."""
    asked: list[Any] = []

    def init(**options: Any) -> Any:
        asked.append(options)
        return SimpleNamespace(
            id=options["id"] or "run1",
            log=lambda values, step: asked.append((values, step)),
            finish=lambda: asked.append("finish"),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return asked


def test_weights_and_biases_get_the_records_and_go_on_as_one_run(
    tmp_path: Path, wandb: list[Any]
) -> None:
    for _ in range(2):
        tracker = WeightsAndBiases("project", tmp_path / "run", {"seed": 1})
        tracker.write(STEP)
        tracker.write(SCORES)
        tracker.close()
    begun, step, scores, finish, resumed, *_ = wandb
    assert (begun["project"], begun["config"], begun["id"]) == ("project", {"seed": 1}, None)
    assert (resumed["id"], resumed["resume"]) == ("run1", "allow")
    assert step == ({"epoch": 0.0, "train/loss": 2.5}, 3)
    assert scores == ({"epoch": 1.0, "val/AP": 0.25, "class/cat": 0.5}, 3)
    assert finish == "finish"


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda folder: TensorBoard(folder), "tensorboard"),
        (lambda folder: WeightsAndBiases("project", folder), "wandb"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_the_extra(
    make: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'implicit\[{package}\]'"):
        make(tmp_path)


def test_a_tracker_that_gets_nothing_writes_nothing(tmp_path: Path, wandb: list[Any]) -> None:
    """As on processes other than the main one."""
    for tracker in (TensorBoard(tmp_path / "board"), WeightsAndBiases("project", tmp_path / "run")):
        tracker.close()
    assert not list(tmp_path.iterdir())
    assert not wandb
