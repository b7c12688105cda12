"""Files from strangers: each is read or refused with a `DataError`; findings stay mended."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from fuzz.targets import TARGETS, run
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_corpus_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    run(path.parent.name, path.read_bytes(), tmp_path)


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in FILES} == set(TARGETS)


@settings(deadline=None, max_examples=60, derandomize=True)  # fuzzing itself looks further
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0.2, 1),
)
def test_damaged_files_are_read_or_refused(
    path: Path, changes: list[tuple[float, int]], length: float
) -> None:
    data = bytearray(path.read_bytes())
    for place, value in changes:
        if data:
            data[int(place * len(data))] = value
    with tempfile.TemporaryDirectory() as folder:
        run(path.parent.name, bytes(data[: max(1, int(length * len(data)))]), Path(folder))
