"""Models in folders and on the hub, which is never asked here."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from small_predictor import picture, small_predictor

import detection
from detection.checkpoints import CheckpointError
from detection.hub import CARD_FILE, MODEL_FILE
from detection.predictor import Predictor


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return small_predictor()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: Any, **__: Any) -> str:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)


def test_a_saved_folder_is_loaded_again(predictor: Predictor, tmp_path: Path) -> None:
    folder = predictor.save_pretrained(tmp_path / "mine", licence="apache-2.0")
    assert sorted(path.name for path in folder.iterdir()) == [CARD_FILE, MODEL_FILE]
    for loaded in (Predictor.from_pretrained(folder), detection.load(str(folder))):
        assert torch.equal(loaded.predict(picture()).boxes, predictor.predict(picture()).boxes)
        assert loaded.metrics == {"AP": 0.5, "AP_large": None} and loaded.step == 7
    predictor.save_pretrained(folder)  # again, in place of the first
    assert len(list(folder.iterdir())) == 2


def test_the_card_says_what_it_is_and_how_it_is_used(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (predictor.save_pretrained(tmp_path / "m", licence="mit") / CARD_FILE).read_text()
    data = huggingface_hub.ModelCard(card).data
    assert data.license == "mit" and data.library_name == "implicit"
    assert data.pipeline_tag == "object-detection" and "small" in data.tags
    assert "| AP | 0.500 |" in card and "AP_large" not in card
    assert "cat (3), dog (17), emu (90)" in card and "6 queries" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    from PIL import Image

    Image.fromarray(picture()).save("image.jpg")
    exec(code, {})
    assert (tmp_path / "found.png").exists()
    bare = (predictor.save_pretrained(tmp_path / "n") / CARD_FILE).read_text()
    assert huggingface_hub.ModelCard(bare).data.license is None
    assert "None is stated for the weights." in bare


def test_a_name_on_the_hub_is_fetched(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = predictor.save_pretrained(tmp_path / "cache")
    asked = []

    def fetched(repo_id: str, filename: str, *, revision: str | None) -> str:
        asked.append((repo_id, filename, revision))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    monkeypatch.chdir(tmp_path)
    assert detection.load("someone/cats-v1.5").recipe == predictor.recipe
    Predictor.from_pretrained("someone/cats", revision="v2")
    assert asked == [
        ("someone/cats-v1.5", MODEL_FILE, None),
        ("someone/cats", MODEL_FILE, "v2"),
    ]


def test_what_lies_on_the_disk_is_never_asked_for(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    predictor.save_pretrained("someone/cats")
    assert detection.load("someone/cats").recipe == predictor.recipe
    # A misspelt path is no name: its folder is here.
    for missing in ("someone/dogs", "runs/best.safetensors", "best", "a/b/c", Path("no/one")):
        with pytest.raises(CheckpointError, match="does not exist"):
            detection.load(missing)


def test_a_name_that_the_hub_does_not_know_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nconnection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(CheckpointError, match=r"someone/cats does not exist here.*no connection"):
        detection.load("someone/cats")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"implicit\[hub\]"):
        detection.load("someone/cats")
    with pytest.raises(ImportError, match=r"implicit\[hub\]"):
        small_predictor().push_to_hub("someone/cats")


def test_what_is_pushed_can_be_loaded(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            assert (repo_id, private, exist_ok) == ("me/cats", True, True)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
            assert repo_id == "me/cats" and commit_message == "Second training"
            for path in Path(folder_path).iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = predictor.push_to_hub("me/cats", private=True, message="Second training")
    assert address == "https://hub/commit/1"
    assert detection.load(tmp_path).recipe == predictor.recipe
    assert 'detection.load("me/cats")' in (tmp_path / CARD_FILE).read_text()
