"""One step of the optimiser: its precision, what it refuses, and what it says."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_runs import small_recipe
from rich.console import Console
from torch import Tensor

from detection.data import compose_digits, load_coco_folder
from detection.data.loading import make_loader
from detection.data.transforms import eval_transform, train_transform
from detection.data.types import Batch
from detection.distributed import Distributed
from detection.evaluation import CocoScores
from detection.models.detector import Detector
from detection.training import loop
from detection.training import step as step_module
from detection.training.determinism import deterministic
from detection.training.loop import TrainingError, train
from detection.training.losses import Criterion
from detection.training.matching import Matcher
from detection.training.progress import read_json_lines
from detection.training.recipe import Recipe
from detection.training.step import Step


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compose_digits(
        tmp_path_factory.mktemp("data") / "digits", train_images=16, val_images=4, size=64
    )


def changed(epochs: int = 1, **settings: Any) -> Recipe:
    base = replace(small_recipe(epochs), save_minutes=60.0)
    return replace(base, optimization=replace(base.optimization, accumulate=1, **settings))


def run(recipe: Recipe, root: Path, folder: Path, **options: Any) -> str:
    """Train; what was said."""
    sets = load_coco_folder(
        root, train_transform(recipe.augmentation), eval_transform(recipe.augmentation)
    )
    said = io.StringIO()
    train(recipe, *sets, folder, console=Console(file=said, width=10_000), **options)
    return said.getvalue()


@pytest.fixture(scope="module")
def batch(digits: Path) -> Batch:
    recipe = changed()
    train_set, _ = load_coco_folder(
        digits, train_transform(recipe.augmentation), eval_transform(recipe.augmentation)
    )
    return next(iter(make_loader(train_set, 8, training=True, workers=0, seed=0)))


def one(recipe: Recipe) -> Step:
    torch.manual_seed(0)
    return Step(Detector(recipe.model), recipe, Distributed(), 2)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.02)])
def test_half_precision_is_near_single(batch: Batch, precision: Any, tolerance: float) -> None:
    """And the weights stay in float32."""
    wanted = one(changed())(batch)
    step = one(changed(precision=precision))
    found = step(batch)
    for name in ("loss", "class", "l1", "giou", "gradient_norm"):
        assert found[name] == pytest.approx(wanted[name], rel=tolerance)
    assert found["class"] != wanted["class"]
    assert {parameter.dtype for parameter in step.detector.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_boxes_matching_and_losses_are_in_single_precision(
    batch: Batch, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    score, costs = Criterion.__call__, Matcher.costs

    def scoring(self: Criterion, logits: Tensor, boxes: Tensor, matches: Any = None) -> Any:
        loss, parts = score(self, logits, boxes, matches)
        seen.extend([boxes.dtype, loss.dtype, *(part.dtype for part in parts.values())])
        return loss, parts

    def costing(self: Matcher, logits: Tensor, boxes: Tensor) -> Tensor:
        found = costs(self, logits, boxes)
        seen.append(found.dtype)
        return found

    monkeypatch.setattr(Criterion, "__call__", scoring)
    monkeypatch.setattr(Matcher, "costs", costing)
    one(changed(precision=precision))(batch)
    assert set(seen) == {torch.float32}


def overflowing(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Gradients that are infinite in some steps, with all that float16 does but float16."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    clip = step_module.clip_gradients
    count = iter(range(10_000))

    def clipping(optimizer: Any, norm: float) -> Tensor:
        found = clip(optimizer, norm)
        return found * math.inf if next(count) in steps else found

    unscale = torch.amp.GradScaler.unscale_
    upcoming = iter(range(10_000))

    def unscaling(self: Any, optimizer: Any) -> None:
        if next(upcoming) in steps:
            optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
        unscale(self, optimizer)

    monkeypatch.setattr(step_module, "clip_gradients", clipping)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscaling)


@pytest.mark.fault(20)
def test_a_step_that_overflows_float16_is_left_out_and_told(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 20: a step overflows float16.

    Expected: weights and average stay, the loss scale is halved, and it is told.
    """
    overflowing(monkeypatch, range(1, 2))
    moved: list[bool] = []
    original = Step.__call__

    def stepping(self: Step, batch: Any) -> dict[str, float]:
        before = [p.clone() for p in self.detector.parameters()]
        record = original(self, batch)
        moved.append(not all(map(torch.equal, before, self.detector.parameters())))
        return record

    monkeypatch.setattr(Step, "__call__", stepping)
    said = run(changed(2, precision="float16"), digits, tmp_path / "run")
    assert moved == [True, False, True, True]
    assert "Step 2 overflowed in float16 and was left out; the loss scale was 1024" in said
    rows = [row for row in read_json_lines(tmp_path / "run" / "log.jsonl") if "loss" in row]
    assert [math.isfinite(row["gradient_norm"]) for row in rows] == moved
    assert [row["loss_scale"] for row in rows] == [1024, 1024, 512, 512]


@pytest.mark.fault(20)
def test_float16_that_overflows_again_and_again_stops(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 20: float16 overflows again and again.

    Expected: training stops and names the precisions that would do.
    """
    overflowing(monkeypatch, range(10_000))
    monkeypatch.setattr(step_module, "MOST_OVERFLOWS", 2)
    step = one(changed(precision="float16"))
    for _ in range(2):
        step(batch)
    with pytest.raises(TrainingError, match=r"Step 3: .* 3 steps on end.*'bfloat16' or 'float32'"):
        step(batch)


def test_a_float16_run_is_resumed_with_its_loss_scale(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflowing(monkeypatch, range(1))
    step = one(changed(precision="float16"))
    step(batch)
    again = one(changed(precision="float16"))
    again.load_state_dict(step.state_dict())
    assert again.scaler.get_scale() == step.scaler.get_scale() == 512
    assert again(batch) == step(batch)


@pytest.mark.fault(18)
def test_a_cost_that_is_not_finite_names_step_images_and_residuals(batch: Batch) -> None:
    """Fault 18: a matching cost that is not finite.

    Expected: training stops before the weights are touched, naming images and residuals.
    """
    step = one(changed())
    bad = Batch(batch.images.float(), batch.sizes, batch.targets)
    bad.images[2, :, 5, 5] = math.nan
    before = [p.clone() for p in step.detector.parameters()]
    with pytest.raises(TrainingError) as caught:
        step(bad)
    message = str(caught.value)
    assert message.startswith("Step 1: The matching costs of 1 of 8 images")
    assert f"(image ids {batch.targets[2].image_id})" in message
    ids = ", ".join(str(target.image_id) for target in batch.targets)
    assert f"Image ids: {ids}. Their relative residuals at the end of the path: " in message
    assert message.split("path: ")[1].split(", ")[2] == "nan"
    assert all(map(torch.equal, before, step.detector.parameters()))


@pytest.mark.fault(18)
def test_a_gradient_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 18: a gradient that is not finite in float32.

    Expected: training stops with image ids and residuals, and goes on from the last checkpoint.
    """
    clip, count = step_module.clip_gradients, iter(range(9))
    monkeypatch.setattr(
        step_module, "clip_gradients", lambda *a: clip(*a) * (math.nan if next(count) == 2 else 1)
    )
    with pytest.raises(TrainingError, match=r"Step 3: .*norm nan.*Image ids: \d+, .*resid"):
        run(changed(2), digits, tmp_path / "run")
    monkeypatch.setattr(step_module, "clip_gradients", clip)
    assert "Resumed after step 2 of 4" in run(changed(2), digits, tmp_path / "run", resume=True)


def test_memory_that_does_not_suffice_is_told_with_what_decides_it(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: CUDA out of memory."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Detector, "losses", full)
    with pytest.raises(
        TrainingError,
        match=r"batch_size=8 on 1 processes with accumulate=1 and precision='float32', images of "
        r"\d+×\d+. What helps: \(a\) accumulate=2",
    ):
        one(changed())(batch)


def test_everything_is_logged(digits: Path, tmp_path: Path) -> None:
    run(replace(changed(), average=0.9), digits, tmp_path / "run")
    *rows, scored = read_json_lines(tmp_path / "run" / "log.jsonl")
    names = ["step", "epoch", "loss", "class", "l1", "giou", "residual", "gradient_norm", "lr"]
    assert list(rows[0]) == [*names, "average_decay"]
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][n] for n in ("class", "l1", "giou")))
    assert [row["average_decay"] for row in rows] == pytest.approx([0.1, 2 / 11])
    assert set(scored["scores"]["per_class"]) == set("0123456789")


def scores(ap: float) -> CocoScores:
    return CocoScores(*[ap] * 12, per_class={})


@pytest.mark.parametrize(
    ("patience", "values", "epochs"),
    [
        (2, [0.1, 0.3, 0.2, 0.3, 0.4], 4),
        (1, [0.1, 0.1, 0.5], 2),
        (0, [0.3, 0.2, 0.1], 3),
        (2, [math.nan] * 3, 2),
    ],
)
def test_training_stops_when_it_gets_no_better(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patience: int,
    values: list[float],
    epochs: int,
) -> None:
    """An equal AP is no better one.  A run that has stopped is not gone on with."""
    upcoming = iter(values)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: scores(next(upcoming)))
    monkeypatch.setattr(loop._Run, "_train_epoch", lambda *_: None)
    recipe = replace(changed(len(values)), patience=patience)
    seen: list[tuple[float, int]] = []
    said = run(
        recipe,
        digits,
        tmp_path / "run",
        on_evaluation=lambda _, found, epoch: seen.append((found.AP, epoch)),
    )
    assert [epoch for _, epoch in seen] == list(range(1, epochs + 1))
    assert (f"Stopped after {epochs} of" in said) == (epochs < len(values))
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: scores(0.9))
    run(recipe, digits, tmp_path / "run", resume=True)
    assert len(read_json_lines(tmp_path / "run" / "log.jsonl")) == epochs


def test_the_run_says_where_it_comes_from(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(changed(), digits, folder, about={"data": digits})
    run(changed(), digits, folder, resume=True)
    found = json.loads((folder / "run.json").read_text())
    assert found["data"] == str(digits)
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"] == sys.argv
    assert (found["device"], found["processes"]) == ("cpu", 1)
    assert found["date"] <= found["resumed"][0]["date"]


class Recording:
    def __init__(self) -> None:
        self.records: list[Any] = []
        self.closed = False

    def write(self, record: Any) -> None:
        self.records.append(json.loads(json.dumps(record)))

    def close(self) -> None:
        self.closed = True


def test_trackers_get_the_records_and_are_closed_whatever_happens(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, failing = Recording(), Recording()
    run(changed(), digits, tmp_path / "run", trackers=[tracker])
    logged = read_json_lines(tmp_path / "run" / "log.jsonl")
    assert repr(tracker.records) == repr(logged)  # NaN is not equal to itself
    assert tracker.closed
    monkeypatch.setattr(Detector, "losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(changed(), digits, tmp_path / "other", trackers=[failing])
    assert failing.closed


def test_determinism_is_proved_and_taken_back(digits: Path, tmp_path: Path) -> None:
    """A whole run on the CPU needs no operation that is not deterministic."""
    assert not torch.are_deterministic_algorithms_enabled()
    seen: list[bool] = []
    run(
        replace(changed(), deterministic=True),
        digits,
        tmp_path / "run",
        on_evaluation=lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_determinism_on_cuda_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with (
        pytest.raises(TrainingError, match="export CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        deterministic(torch.device("cuda")),
    ):
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with deterministic(torch.device("cuda")):
        assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.deterministic


UNGUARDED = """
import torch.multiprocessing
torch.multiprocessing.set_start_method("spawn", force=True)
from detection.data import load_coco_folder, make_loader
train_set, _ = load_coco_folder({root!r})
next(iter(make_loader(train_set, 2, training=True, workers=1, seed=0)))
"""


@pytest.mark.fault(23)
@pytest.mark.slow
def test_workers_without_a_main_guard_end_in_a_sentence(digits: Path, tmp_path: Path) -> None:
    """Fault 23: workers are spawned by a script without ``if __name__ == "__main__"``.

    Expected: it ends, and the last line says what the script lacks.
    """
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.format(root=str(digits)))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert 'if __name__ == "__main__":' in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: changed(precision="half"), "precision='half'.*'bfloat16' or 'float16'"),
        (lambda: changed(**{"batch_size": 0}), "batch_size=0"),
        (lambda: replace(changed(), patience=-1), "patience=-1"),
        (lambda: replace(changed(), save_minutes=math.nan), "save_minutes=nan"),
    ],
)
def test_settings_out_of_range_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()
