"""The page of a run: its numbers, what it may load, and how a browser shows it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_predictor import picture, small_predictor
from torch import Tensor

from detection.checkpoints import CheckpointError
from detection.cli import main
from detection.data import Categories, DataError
from detection.detections import Detections
from detection.models.config import StackedConfig
from detection.predictor import Predictor
from detection.report import write_report
from detection.report.confusion import confusion_matrix, pair

HOSTILE = '<img src=x onerror="alert(1)">'
CATEGORIES = Categories(("cat", HOSTILE, "emu & co"), (3, 17, 90))


def write_data(root: Path, categories: Categories = CATEGORIES) -> Path:
    """Three images of different sizes: two objects and a crowd, one object, none."""
    sizes = ((50, 70), (64, 40), (30, 90))
    boxes = [(1, 3, [5, 5, 30, 30], 0), (1, 90, [0, 0, 70, 50], 1), (1, 17, [30, 10, 30, 30], 0)]
    boxes.append((2, 17, [10, 20, 20, 30], 0))
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir(parents=True)
        for number, size in enumerate(sizes, start=1):
            image = Image.fromarray(picture(*size, seed=number))
            image.save(root / f"{split}2017" / f"a & <b>{number}.png")
        document = {
            "images": [
                {"id": n, "file_name": f"a & <b>{n}.png", "height": h, "width": w}
                for n, (h, w) in enumerate(sizes, start=1)
            ],
            "categories": [
                {"id": i, "name": name}
                for name, i in zip(categories.names, categories.ids, strict=True)
            ],
            "annotations": [
                {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": 900, "iscrowd": w}
                for n, (i, c, box, w) in enumerate(boxes, start=1)
            ],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))
    return root


def write_run(folder: Path, data: Path, predictor: Predictor) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    predictor.save_checkpoint(folder / "checkpoints" / "best.safetensors")
    records = [{"step": n, "loss": 9 / n, "gradient_norm": 1.0} for n in range(1, 9)]
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    about = {"data": str(data), "device": "cpu", "command": ["deqdet", HOSTILE]}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    return write_run(folder, data, small_predictor(categories=CATEGORIES))


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    assert main(["report", str(run), "--threshold", "0.5"]) == 0
    return run / "report.html"


class Reader(HTMLParser):
    """Every tag with its attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)
        elif data.strip():
            self.words.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def test_the_page_loads_nothing_and_runs_its_own_script_alone(page: Path) -> None:
    reader = Reader(page.read_text(encoding="utf-8"))
    for tag, attributes in reader.tags:
        for name in ("src", "href", "xlink:href", "data", "action"):
            address = attributes.get(name, "#")
            assert address.startswith(("#", "data:image/jpeg;base64,")), (tag, address[:60])
        assert not any(name.startswith("on") for name in attributes), tag
    (script,) = reader.scripts
    wanted = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for t, a in reader.tags if "content-security" in str(a).lower())
    assert f"script-src 'sha256-{wanted}'" in policy
    assert "default-src 'none'" in policy
    assert page.stat().st_size < 2e6


def test_names_of_the_data_are_text(page: Path) -> None:
    reader = Reader(page.read_text(encoding="utf-8"))
    assert any(HOSTILE in word for word in reader.words)
    assert all("onerror" not in attributes for _, attributes in reader.tags)
    assert any("a & <b>1.png (image id 1)" in word for word in reader.words)


def test_the_page_tells_coco_s_figures_and_every_class(page: Path, run: Path, data: Path) -> None:
    scores_file = run / "scores.json"
    assert (
        main(
            [
                "evaluate",
                str(run),
                "--data",
                str(data),
                "--json",
                str(scores_file),
                "--workers",
                "0",
            ]
        )
        == 0
    )
    scores = json.loads(scores_file.read_text())
    words = Reader(page.read_text(encoding="utf-8")).words
    for name, value in scores.items():
        if name.startswith("A"):
            shown = "–" if value is None or value != value else f"{value:.3f}"
            assert words[words.index(name.replace("_", " ")) + 1] == shown, name
    assert set(CATEGORIES.names) <= set(words)


def test_a_film_has_a_frame_for_the_start_and_for_each_refinement(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    films = re.findall(r'<figure class="film">.*?</figure>', text, flags=re.DOTALL)
    assert len(films) == 3
    for film in films:
        assert len(re.findall(r'<g class="step', film)) == 1 + 4  # steps of small_predictor
        assert film.count("shown") == 1


def test_a_decoder_that_solves_nothing_has_a_page_too(data: Path, tmp_path: Path) -> None:
    plain = small_predictor(StackedConfig(layers=2), categories=CATEGORIES)
    path = write_report(write_run(tmp_path / "plain", data, plain))
    text = path.read_text(encoding="utf-8")
    assert "Relative residual" not in text and "COCO box metrics" in text


@pytest.mark.parametrize(
    ("broken", "kind", "words"),
    [
        ("checkpoints", CheckpointError, "checkpoint"),
        ("log.jsonl", DataError, "there is no such file"),
        ("run.json", DataError, "does not say where its data lies"),
    ],
)
def test_what_is_missing_is_named(
    run: Path, tmp_path: Path, broken: str, kind: type[Exception], words: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / broken
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(kind, match=words):
        write_report(folder)


def test_data_that_has_moved_is_named_and_other_data_refused(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "run.json").write_text(json.dumps({"data": str(tmp_path / "gone")}))
    (folder / "report.html").write_text("what was there before")
    with pytest.raises(DataError, match="no longer there"):
        write_report(folder)
    other = write_data(tmp_path / "other", Categories(("a", "b", "c"), (3, 17, 90)))
    with pytest.raises(DataError, match="must have the same categories"):
        write_report(folder, other)
    assert (folder / "report.html").read_text() == "what was there before"


def test_pairs_prefer_the_class_and_then_the_overlap() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [40, 0, 50, 10]])
    labels = torch.tensor([0, 1, 2])
    found = Detections(
        torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 10], [80, 0, 90, 10], [40, 0, 50, 10]]),
        torch.tensor([0.9, 0.8, 0.7, 0.1]),
        torch.tensor([1, 0, 0, 2]),
    )
    # The surer detection overlaps object 0 wholly, but is of object 1's class.
    pairs = pair(found, boxes, labels, 3, threshold=0.5)
    assert confusion_matrix([pairs], 3).tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 1],  # its detection is below the threshold
        [1, 0, 0, 0],  # nothing is there
    ]
    assert pairs.mistakes == 2
    crowd = torch.tensor([[75.0, 0, 86, 20]])  # holds 6 of the 10 columns of the third
    assert pair(found, boxes, labels, 3, threshold=0.5, crowds=crowd).mistakes == 1
    crowd[:, 2] = 85
    assert pair(found, boxes, labels, 3, threshold=0.5, crowds=crowd).mistakes == 2


def _boxes(chance: np.random.Generator, count: int) -> Tensor:
    corners = chance.integers(0, 20, (count, 2))
    sides = chance.integers(1, 12, (count, 2))
    return torch.tensor(np.concatenate([corners, corners + sides], axis=1), dtype=torch.float32)


@given(seed=st.integers(0, 2**32 - 1), objects=st.integers(0, 6), found=st.integers(0, 8))
@settings(derandomize=True, deadline=None)
def test_every_object_and_every_detection_counts_once(seed: int, objects: int, found: int) -> None:
    chance = np.random.default_rng(seed)
    labels = torch.tensor(chance.integers(0, 3, objects))
    scores = torch.tensor(np.sort(chance.random(found))[::-1].copy(), dtype=torch.float32)
    detections = Detections(
        _boxes(chance, found), scores, torch.tensor(chance.integers(0, 3, found))
    )
    pairs = pair(detections, _boxes(chance, objects), labels, 3, threshold=0.4)
    counts = confusion_matrix([pairs], 3)
    shown = detections.above(0.4)
    assert torch.equal(counts[:3].sum(1), labels.bincount(minlength=3))
    assert torch.equal(counts[:, :3].sum(0), shown.labels.bincount(minlength=3))
    assert counts[3, 3] == 0


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium: apt install chromium")
@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_the_page(page: Path, tmp_path: Path, width: int) -> None:
    """The script runs under the policy, nothing is refused, and there is something to see."""
    shot = tmp_path / "page.png"
    ran = subprocess.run(
        [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=2000", f"--window-size={width},2400"),
            *("--dump-dom", f"--screenshot={shot}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in ran.stderr  # neither errors nor refusals of the policy
    assert ran.stdout.count("refinement 4 of 4") == 3
    assert 'class="controls" hidden' not in ran.stdout
    with Image.open(shot) as seen:
        assert seen.width == width
        pixels = np.asarray(seen.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    # Nothing reaches over the right edge: the margin is paper from top to bottom.
    assert (pixels[:, -4:] == pixels[0, -1]).all()
