"""The commands of ``deqdet``: from a folder of images to a detector, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from detection.cli import COMMANDS, main
from detection.commands.folders import new_folder
from detection.data import compose_digits
from detection.data.video import VideoWriter, read_frames
from detection.distributed import Distributed

ROOT = Path(__file__).parents[2]
QUICK = [
    *("--optimization.epochs", "1", "--optimization.batch-size", "8"),
    *("--optimization.warmup-steps", "2", "--augmentation.short-sides", "64"),
    *("--augmentation.max-size", "64", "--model.num-queries", "6", "--model.decoder.steps", "3"),
    *("--model.decoder.train-steps", "3", "--model.decoder.multiples", "1"),
]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of labelled images in COCO's format."""
    return compose_digits(
        tmp_path_factory.mktemp("own") / "images", train_images=16, val_images=4, size=64
    )


@pytest.fixture(scope="module")
def trained(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the second of the three commands."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    assert main(["train", "--data", str(own), "--output", str(folder), *QUICK]) == 0
    return folder


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was written to both streams, on one line."""
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return " ".join((said.out + said.err).replace("│", " ").split())


@pytest.mark.slow
def test_three_commands_make_a_detector(
    own: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """check-data, train, predict: from a folder of images to boxes on a new one."""
    sheet, found = tmp_path / "sheet.png", tmp_path / "found"
    assert main(["check-data", str(own), "--sheet", str(sheet)]) == 0
    assert "can be trained on" in told(capsys)
    with Image.open(sheet) as picture:
        assert picture.width > 100
    run = json.loads((trained / "run.json").read_text())
    assert run["data"] == str(own.resolve())
    assert (trained / "validation" / "epoch_001.png").is_file()
    image = next((own / "val2017").iterdir())
    command = ["predict", str(image), "--checkpoint", str(trained), "--output", str(found)]
    assert main(command) == 0
    assert {path.name for path in found.iterdir()} == {
        "000_" + image.stem + ".png",
        "detections.json",
    }
    records = json.loads((found / "detections.json").read_text())
    assert records and {record["file"] for record in records} == {str(image)}
    capsys.readouterr()
    assert main(command) == 2  # what is there is left as it is
    assert "not an empty folder" in told(capsys)


def test_a_run_goes_on_with_its_own_recipe_and_data(
    own: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume --output is enough; what else is named must be what it was."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = (folder / "log.jsonl").read_text()
    assert main(["train", "--resume", "--output", str(folder)]) == 0
    assert f"{own.name} (COCO)" in told(capsys)
    assert (folder / "log.jsonl").read_text() == before
    assert "resumed" in json.loads((folder / "run.json").read_text())
    assert main(["train", "--resume", "--output", str(folder), "--seed", "1"]) == 2
    assert "was trained with another configuration" in told(capsys)
    assert main(["train", "--resume", "--output", str(tmp_path / "nowhere")]) == 2
    assert "no run lies there to go on with" in told(capsys)
    (folder / "config.json").write_text('{"name": 3}')
    assert main(["train", "--resume", "--output", str(folder)]) == 2
    assert "config.json: this is no recipe" in told(capsys)


@pytest.mark.slow
def test_processes_tell_an_error_once(own: Path, tmp_path: Path) -> None:
    """What is wrong with options or data is said by one of the processes, and all end."""
    broken = tmp_path / "broken"
    shutil.copytree(own, broken)
    shutil.rmtree(broken / "train2017")
    for arguments, words in (
        (["--data", str(broken), *QUICK], "train2017"),
        (["--sead", "3"], "--seed"),
    ):
        run = ["--nproc_per_node=2", "--standalone", "-m", "detection", "train", *arguments]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *run],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        said = done.stderr.split("torch.distributed.elastic")[0]
        assert done.returncode != 0
        assert said.count(words) == 1, said
        assert said.count("Traceback") <= 1  # that of torchrun itself


@pytest.mark.fault(25)
@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_batch(own: Path, trained: Path, tmp_path: Path) -> None:
    """Fault 25: the AP depends on how images were batched.

    Expected: the same scores with any batch size.
    """
    scores = []
    for size in ("1", "3"):
        path = tmp_path / f"{size}.json"
        words = ["--data", str(own), "--batch-size", size, "--steps", "4", "--json", str(path)]
        assert main(["evaluate", str(trained), *words]) == 0
        scores.append(json.loads(path.read_text()))
    assert scores[0] == scores[1] and "AP" in scores[0]


@pytest.mark.slow
def test_a_bad_image_is_told_and_the_others_go_on(
    own: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((own / "val2017").iterdir())[:2]:
        shutil.copy(path, images)
    (images / "000000.jpg").write_bytes(b"no picture")
    output = tmp_path / "found"
    words = ["--checkpoint", str(trained), "--output", str(output), "--threshold", "0"]
    assert main(["predict", str(images), *words]) == 1
    assert "000000.jpg: the image cannot be read" in told(capsys)
    assert len(list(output.glob("*.png"))) == 2
    records = json.loads((output / "detections.json").read_text())
    assert len({record["file"] for record in records}) == 2


@pytest.mark.slow
def test_a_video_becomes_a_video(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film, output = tmp_path / "film.mp4", tmp_path / "found"
    with VideoWriter(film, 10.0) as writer:
        for level in range(4):
            writer.write(Image.new("RGB", (64, 64), (60 * level,) * 3))
    words = ["--checkpoint", str(trained), "--output", str(output)]
    assert main(["predict", str(film), *words]) == 0
    assert "4 frames" in told(capsys)
    assert len(list(read_frames(output / "000_film.mp4"))) == 4
    records = json.loads((output / "detections.json").read_text())
    assert {record["frame"] for record in records} == {0, 1, 2, 3}


@pytest.mark.slow
def test_a_checkpoint_is_exported_and_timed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.pt2"
    words = ["export", str(trained), str(target), "--size", "64", "64", "--steps", "2"]
    assert main(words) == 0 and target.stat().st_size > 1e6
    assert main(words) == 2
    assert "exists and is left as it is" in told(capsys)
    words = ["--size", "64", "64", "--runs", "2", "--steps", "2"]
    assert main(["benchmark", str(trained), *words]) == 0
    assert "images/s" in told(capsys)


def test_a_folder_with_errors_has_status_1(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    shutil.copytree(own, root)
    path = root / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["category_id"] = 10**6
    document["annotations"][1]["bbox"] = [0, 0, -4, 4]
    path.write_text(json.dumps(document))
    assert main(["check-data", str(root)]) == 1
    said = told(capsys)
    assert "cannot be trained on (2 errors" in said and "1000000" in said
    assert main(["train", "--data", str(root), "--output", str(tmp_path / "run")]) == 2
    assert "2 errors keep the data from being trained on" in told(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--optimisation.epochs", "3"], "--optimization.epochs"),
        (["train", "--recipe", "deqdet_r50_1"], "Did you mean 'deqdet_r50_1x'"),
        (["train", "--resume"], "--resume needs --output"),
        (["train", "--resume", "--output", "a", "--from", "b"], "--resume and --from exclude"),
        (["train", "--data", "x", "--digits.size", "64"], "--data and --digits exclude"),
        (["train", "--threshold", "2"], "must lie in [0, 1]"),
        (["train", "--data", "nowhere"], "nowhere: there is no such folder"),
        (["train", "--data", "file.txt"], "file.txt"),
        (["train", "--output", "full"], "full: this is not an empty folder"),
        (["evaluate", "nothing.safetensors"], "nothing.safetensors does not exist"),
        (["predict", "--checkpoint", "full"], "There are no images to detect in"),
        (["predict", "no*.jpg", "--checkpoint", "full"], "nothing matches this pattern"),
        (["export", "a", "b.tflite", "--size", "64", "64"], "must end in .onnx or .pt2"),
        (["benchmark", "deqdet_r50_1x", "--size", "50", "64"], "multiples of 32"),
        (["convert", "nowhere.pth", "a.safetensors"], "nowhere.pth does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 2, one sentence, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    (tmp_path / "file.txt").write_text("text")
    assert main(words) == 2
    assert complaint in told(capsys)
    assert {path.name for path in tmp_path.rglob("*")} == {"full", "a.txt", "file.txt"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_the_options_on_one_screen(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    own = next((i for i, line in enumerate(lines) if "--name STR" in line), len(lines))
    assert lines[0].startswith(f"usage: deqdet {name}") and own <= 45


def test_runs_of_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    folders = [new_folder("mine", Distributed()) for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)
