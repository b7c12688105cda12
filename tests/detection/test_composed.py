"""Composed data sets: repeatable, reused, safe to compose at once, and never destructive."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from detection.data import DataError, compose_digits, compose_scenes
from detection.data import composed as module

COUNTS = {"train_images": 12, "val_images": 6}
Compose = Callable[..., Path]


@pytest.fixture(scope="module", params=[compose_digits, compose_scenes], ids=["digits", "scenes"])
def compose(request: pytest.FixtureRequest) -> Compose:
    return request.param


@pytest.fixture(scope="module")
def name(compose: Compose) -> str:
    return compose.__name__.removeprefix("compose_")


@pytest.fixture(scope="module")
def root(compose: Compose, name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compose(tmp_path_factory.mktemp(name) / name, **COUNTS)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_parameters_same_bytes(compose: Compose, root: Path, tmp_path: Path) -> None:
    assert files(compose(tmp_path / "again", **COUNTS)) == files(root)
    other = files(compose(tmp_path / "other", **COUNTS, seed=1))
    assert other["train2017/000001.jpg"] != files(root)["train2017/000001.jpg"]


def test_images_do_not_depend_on_how_many_there_are(
    compose: Compose, root: Path, tmp_path: Path
) -> None:
    few = files(compose(tmp_path / "few", train_images=2, val_images=1))
    assert few["train2017/000002.jpg"] == files(root)["train2017/000002.jpg"]


def test_a_finished_folder_is_reused(
    compose: Compose, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, "write_split")
    assert compose(root, **COUNTS) == root


def test_a_foreign_folder_is_refused_and_left_alone(
    compose: Compose, name: str, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("words")
    before = files(tmp_path)
    with pytest.raises(DataError, match=f"is no {name} data set; it is left untouched"):
        compose(tmp_path / "thesis", **COUNTS)
    with pytest.raises(DataError, match=f"is no {name} data set"):
        compose(tmp_path / "thesis" / "chapter1.txt", **COUNTS)
    assert files(tmp_path) == before


def test_one_data_set_is_not_another(tmp_path: Path) -> None:
    root = compose_digits(tmp_path / "data", train_images=1, val_images=1)
    with pytest.raises(DataError, match="is no scenes data set"):
        compose_scenes(root, train_images=1, val_images=1)


def test_other_parameters_are_refused(compose: Compose, name: str, root: Path) -> None:
    before = files(root)
    with pytest.raises(DataError, match=rf"the {name} here have val_images 6 \(wanted: 7\)"):
        compose(root, train_images=12, val_images=7)
    assert files(root) == before


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_changed_files_are_noticed(
    compose: Compose, name: str, tmp_path: Path, damage: str
) -> None:
    root = compose(tmp_path / name, train_images=1, val_images=1)
    (root / "train2017" / ".DS_Store").write_text("what file managers leave does not count")
    assert compose(root, train_images=1, val_images=1) == root
    path = root / "train2017" / "000001.jpg"
    if damage == "change":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "remove":
        path.unlink()
    else:
        Image.new("RGB", (9, 9)).save(root / "train2017" / "mine.jpg")
    with pytest.raises(DataError, match=f"files were changed since the {name} were composed"):
        compose(root, train_images=1, val_images=1)


def test_a_killed_composition_leaves_nothing_behind(
    compose: Compose, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> str:
        raise KeyboardInterrupt

    root = tmp_path / name
    with monkeypatch.context() as patch:
        patch.setattr(module, "fingerprint", killed)
        with pytest.raises(KeyboardInterrupt):
            compose(root, train_images=1, val_images=1)
    assert not any(tmp_path.iterdir())
    # What a process that was killed outright has left is removed once it is old.
    old, young = tmp_path / f".{name}.partial-old", tmp_path / f".{name}.partial-young"
    for partial in (old, young):
        partial.mkdir()
        (partial / f"{name}.json").write_text("{}")
    os.utime(old, (0, 0))
    root.mkdir()  # an empty folder is as good as none
    compose(root, train_images=1, val_images=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, name]
    assert json.loads((root / f"{name}.json").read_text())["parameters"]["seed"] == 0


def test_two_processes_at_once(
    compose: Compose, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other one finishes while this one composes: its folder is used."""
    target = tmp_path / name
    write = module.write_split

    def overtaken(composition: object, folder: Path, split: str, *arguments: object) -> None:
        write(composition, folder, split, *arguments)  # type: ignore[arg-type]
        if split == "val2017":
            monkeypatch.setattr(module, "write_split", write)
            monkeypatch.setattr(module.os, "getpid", lambda: -1)
            compose(target, train_images=1, val_images=1)

    monkeypatch.setattr(module, "write_split", overtaken)
    assert compose(target, train_images=1, val_images=1) == target
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_libraries_name_the_extra(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install \"\.\[detection\]\""):
        compose(tmp_path / "data", **COUNTS)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("parameter", "value"), [("train_images", 0), ("val_images", 0), ("size", 63), ("seed", -1)]
)
def test_impossible_parameters(
    compose: Compose, name: str, tmp_path: Path, parameter: str, value: int
) -> None:
    with pytest.raises(ValueError, match=f"compose_{name}.{parameter}={value}.: at least"):
        compose(tmp_path / name, **{**COUNTS, parameter: value})
