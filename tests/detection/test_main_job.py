"""The main job end to end, shortened, and what happens when it is given something wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from detection.configuration import from_json
from detection.data import compose_digits, load_coco_folder
from detection.data.transforms import eval_transform, train_transform
from detection.models.detector import Detector
from detection.prediction import evaluate, predict
from detection.pretrained import load_detector
from detection.recipes import recipe
from detection.training.loop import TrainingError, train
from detection.training.progress import read_json_lines
from detection.training.recipe import Recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "deqdet_coco.py"
SHORT = [
    "--digits.train-images=800",
    "--digits.val-images=64",
    "--optimization.epochs=3",
    "--optimization.warmup-steps=20",
    "--optimization.batch-size=8",
    "--optimization.lr=2e-3",
    "--average=0.98",
    "--model.decoder.train-steps=6",
    "--model.decoder.multiples=1",
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deqdet_coco", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["deqdet_coco"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compose_digits(
        tmp_path_factory.mktemp("data") / "digits", train_images=24, val_images=8, size=64
    )


def tiny(**changes: object) -> Recipe:
    """A recipe whose steps take some milliseconds."""
    base = recipe("deqdet_digits")
    decoder = replace(base.model.decoder, train_steps=3, multiples=1, spacing=2, steps=3)
    return replace(
        base,
        model=replace(base.model, decoder=decoder, num_queries=6),
        augmentation=replace(base.augmentation, short_sides=(64,), max_size=64),
        optimization=replace(base.optimization, epochs=2, batch_size=8, warmup_steps=2),
        evaluate_every=2,
        **changes,  # type: ignore[arg-type]
    )


def run(settings: Recipe, root: Path, folder: Path, resume: bool = False):
    sets = load_coco_folder(
        root, train_transform(settings.augmentation), eval_transform(settings.augmentation)
    )
    return train(settings, *sets, folder, resume=resume)


@pytest.mark.slow
def test_main_job(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Composes, trains, evaluates and draws; the loss falls and the AP is above chance."""
    monkeypatch.chdir(tmp_path)
    assert example.main([*SHORT, "--output", "run"]) == 0
    printed = capsys.readouterr().out
    assert "AP50" in printed
    assert "gradient norm" in printed

    folder = tmp_path / "run"
    log = read_json_lines(folder / "log.jsonl")
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 300
    assert sum(losses[-20:]) < 0.35 * sum(losses[:20])
    scored = [row["scores"] for row in log if "scores" in row]
    final, best_scored = scored[-1], max(scores["AP"] for scores in scored)

    settings = from_json(Recipe, json.loads((folder / "config.json").read_text()))
    _, val = load_coco_folder(
        tmp_path / "data" / "digits-800-64-128px-seed0",
        None,
        eval_transform(settings.augmentation),
    )
    torch.manual_seed(0)
    chance = evaluate(Detector(settings.model), val).AP
    assert chance < 0.005
    assert final["AP"] > 0.02

    # What was saved is what was scored.
    best = folder / "checkpoints" / "best.safetensors"
    model, _, categories = load_detector(best)
    assert evaluate(model, val, batch_size=3).AP == pytest.approx(best_scored, abs=1e-6)
    assert categories.names == tuple("0123456789")

    for name, frames in (("validation.png", 1), ("training.png", 1), ("refinement.gif", 26)):
        with Image.open(folder / name) as picture:
            assert getattr(picture, "n_frames", 1) == frames

    # The other two uses of the example, on what the first one wrote.
    assert example.main([*SHORT, "--evaluate", str(best)]) == 0
    assert f"{best_scored:.3f}" in capsys.readouterr().out
    picture = val.path(0)
    command = ["--predict", str(picture), "--checkpoint", str(best), "--output", "found"]
    assert example.main(command) == 0
    records = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert records
    assert all(record["category_id"] in categories.ids for record in records)
    assert (tmp_path / "found" / f"000_{picture.stem}.png").exists()


def test_resumed_run_equals_uninterrupted_run(digits: Path, tmp_path: Path) -> None:
    """Killed after its first epoch and resumed, a run ends with the same bits."""
    whole = run(tiny(), digits, tmp_path / "whole")
    settings = tiny()
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    first, second = sorted((killed / "checkpoints").glob("step_*.safetensors"))
    second.unlink()
    second.with_suffix(".training.pt").unlink()
    with open(killed / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 6, "lo')  # killed while it wrote
    resumed = run(settings, digits, killed, resume=True)
    assert first.exists()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert (killed / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_existing_run_is_not_overwritten(digits: Path, tmp_path: Path) -> None:
    run(tiny(), digits, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(TrainingError, match="another run.*--resume"):
        run(tiny(), digits, tmp_path / "run")
    with pytest.raises(TrainingError, match="another configuration"):
        run(tiny(seed=1), digits, tmp_path / "run", resume=True)
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        run(tiny(), digits, tmp_path / "nowhere", resume=True)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_folder_of_other_files_is_refused(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 5}\n')
    with pytest.raises(TrainingError, match="not an empty folder.*--output"):
        run(tiny(), digits, tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 5}\n'


@pytest.mark.fault(18)
def test_non_finite_loss_stops_with_image_ids(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 18: a loss that is not finite.

    Expected: training stops and names the images.
    """
    original = Detector.losses

    def broken(self: Detector, *args: object):
        supervised = original(self, *args)  # type: ignore[arg-type]
        supervised.total = supervised.total * math.inf
        return supervised

    monkeypatch.setattr(Detector, "losses", broken)
    with pytest.raises(TrainingError, match=r"Step 1: loss inf.*Image ids: \d+, \d+"):
        run(tiny(), digits, tmp_path / "run")


@pytest.mark.fault(6)
def test_images_without_objects_train(digits: Path, tmp_path: Path) -> None:
    """Fault 6: a batch without a single object.

    Expected: finite losses; the normaliser is at least one.
    """
    root = tmp_path / "sparse"
    shutil.copytree(digits, root)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][:1]
    path.write_text(json.dumps(content))
    trained = run(tiny(skip_empty=False), root, tmp_path / "run")
    rows = [row for row in read_json_lines(trained.folder / "log.jsonl") if "loss" in row]
    assert len(rows) == 6
    assert all(math.isfinite(row["loss"]) and row["loss"] < 1e3 for row in rows)


def test_prediction_matches_evaluation_and_ignores_the_batch(digits: Path, tmp_path: Path) -> None:
    """An image gives the same detections alone, from its file, and in any batch."""
    settings = tiny()
    trained = run(settings, digits, tmp_path / "run")
    _, val = load_coco_folder(digits, None, eval_transform(settings.augmentation))
    paths = [val.path(i) for i in range(4)]
    together = predict(trained.model, paths, settings.augmentation)
    for path, found in zip(paths, together, strict=True):
        (alone,) = predict(trained.model, [path], settings.augmentation)
        torch.testing.assert_close(alone.boxes, found.boxes, atol=1e-4, rtol=0)
        torch.testing.assert_close(alone.scores, found.scores, atol=1e-5, rtol=0)
    scores = [evaluate(trained.model, val, batch_size=size) for size in (1, 8)]
    assert repr(scores[0]) == repr(scores[1])


@pytest.mark.fault(22)
@pytest.mark.slow
def test_two_processes_train_together(digits: Path, tmp_path: Path) -> None:
    """Fault 22: collectives that only the main process enters, and unused parameters.

    Expected: under torchrun one process writes, all train, every image is scored once, none waits.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        *(
            str(EXAMPLE),
            "--data",
            str(digits),
            "--output",
            str(tmp_path / "run"),
            "--device",
            "cpu",
        ),
        *("--augmentation.short-sides", "64", "--augmentation.max-size", "64"),
        *("--optimization.epochs", "1", "--optimization.batch-size", "8"),
        *("--model.decoder.train-steps", "3", "--model.decoder.multiples", "1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = read_json_lines(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert done.stdout.count("COCO box metrics") == 1
    _, _, categories = load_detector(tmp_path / "run" / "checkpoints" / "best.safetensors")
    assert len(categories) == 10


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "nowhere"], "nowhere: there is no such folder; expected: train2017/"),
        (["--recipe", "deqdet_r50_1"], "Did you mean 'deqdet_r50_1x'"),
        (["--evaluate", "nothing.safetensors"], "nothing.safetensors does not exist"),
        (["--predict", "a.jpg"], "--predict needs --checkpoint"),
        (["--checkpoint", "a.safetensors"], "--checkpoint goes with --predict"),
        (["--resume"], "--resume needs --output"),
        (["--device", "cuda:99"], "The device 'cuda:99'"),
        (["--model.decoder.multiples", "9"], "lies beyond the path of 20 steps"),
    ],
)
def test_mistakes_end_in_a_sentence(
    example: ModuleType,
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 2 and what to do, at once; nothing is written."""
    monkeypatch.chdir(tmp_path)
    if "cuda:99" in arguments and torch.cuda.is_available():
        complaint = "cuda:99"
    try:
        status = example.main(arguments)
    except SystemExit as stop:  # tyro's own refusals
        status = stop.code
    assert status == 2
    printed = capsys.readouterr()
    assert complaint in " ".join((printed.err + printed.out).replace("│", " ").split())
    assert not list(tmp_path.iterdir())
