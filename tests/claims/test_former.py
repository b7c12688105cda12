"""Results of former code are taken for the present one's where they are its results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import former
from benchmarks.claims.former import Alike, as_now
from benchmarks.claims.presets import PRESETS
from benchmarks.claims.results import Record, path_of, read
from benchmarks.claims.versions import fingerprint

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CPU = PRESETS["cpu"]


@pytest.fixture(scope="module")
def kept() -> list[Record]:
    records, _ = read(path_of(RESULTS, "cpu"))
    assert records
    return records


def kinds(record: Record) -> set[Any]:
    return {point["kind"] for point in record.inference["curve"]}


def test_stored_settings_are_runs_of_the_preset_as_it_is_now(kept: list[Record]) -> None:
    now = {arm: run for run, arms in CPU.runs().items() for arm in arms}
    for record in kept:
        assert as_now(record, CPU).run == now[record.arms[0]]


def test_another_setting_is_another_run_and_an_unknown_one_keeps_its_name(
    kept: list[Record],
) -> None:
    recipe = kept[0].recipe
    longer = {**recipe, "optimization": {**recipe["optimization"], "epochs": 11}}
    assert as_now(replace(kept[0], recipe=longer), CPU).run != as_now(kept[0], CPU).run
    strange = replace(kept[0], recipe={**recipe, "colour": "red"}, run="r")
    assert as_now(strange, CPU).run == "r"


def test_code_that_trains_alike_counts_as_the_present_one(
    kept: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = replace(kept[0], code="before")
    monkeypatch.setattr(former, "ALIKE", {"before": Alike(fingerprint(), without=("auto",))})
    taken = as_now(record, CPU)
    assert (taken.code, taken.versions["code"]) == (fingerprint(), "before")
    assert kinds(record) - kinds(taken) == {"auto"} and taken.ap == record.ap
    assert as_now(replace(record, status="failed", inference={}), CPU).inference == {}


def test_once_the_code_has_changed_it_does_not(
    kept: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = replace(kept[0], code="before")
    monkeypatch.setattr(former, "ALIKE", {"before": Alike("since", without=("auto",))})
    taken = as_now(record, CPU)
    assert taken.code == "before" and kinds(taken) == kinds(record)
