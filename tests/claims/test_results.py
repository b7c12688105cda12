"""What is kept can be read again, what is torn is put aside, and other versions stay out."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.claims import versions
from benchmarks.claims.results import (
    Record,
    append,
    by_arm,
    latest,
    of_version,
    path_of,
    read,
    repair,
)

MakeRecord = Callable[..., Record]


def test_what_is_appended_is_read_again(tmp_path: Path, make_record: MakeRecord) -> None:
    path = path_of(tmp_path, "cpu")
    assert path.name == "claims-cpu.jsonl" and read(path) == ([], [])
    records = [make_record("deqdet", seed, 40 + seed) for seed in (0, 1)]
    for record in records:
        append(path, record)
    assert read(path) == (records, [])
    assert records[1].ap == pytest.approx(41) and records[1].finished
    assert records[1].ap_at(25) == pytest.approx(41 - 10 / 26) and records[1].ap_at(24) is None


def test_who_reads_writes_nothing(tmp_path: Path, make_record: MakeRecord) -> None:
    """The line may be one that is just being written."""
    path = path_of(tmp_path, "cpu")
    append(path, make_record("deqdet", 0, 40))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    records, told = read(path)
    assert len(records) == 1 and told == [f"{path}: 1 line is damaged, and left out."]
    assert path.read_bytes() == whole + whole[:100] and list(tmp_path.iterdir()) == [path]


def test_a_torn_line_is_put_aside_and_told(tmp_path: Path, make_record: MakeRecord) -> None:
    path = path_of(tmp_path, "cpu")
    append(path, make_record("deqdet", 0, 40))
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(whole[:100])
    (told,) = repair(path)
    assert path.read_bytes() == whole and repair(path) == []
    assert "1 line was damaged and put aside in claims-cpu.jsonl.aside" in told
    assert path.with_name("claims-cpu.jsonl.aside").read_bytes() == whole[:100] + b"\n"
    append(path, make_record("deqdet", 1, 41))
    assert len(read(path)[0]) == 2 and read(path)[1] == []


@pytest.mark.parametrize("line", ["[1]", '{"format": 0}', '{"format": 1}', "\u2028", "{"])
def test_whatever_is_no_record_is_put_aside(
    tmp_path: Path, make_record: MakeRecord, line: str
) -> None:
    path = path_of(tmp_path, "cpu")
    path.write_text(f"{line}\n", encoding="utf-8")
    append_to = make_record("deqdet", 0, 40)
    records, told = read(path)
    assert records == [] and len(told) == len(repair(path)) == 1
    append(path, append_to)
    assert read(path) == ([append_to], [])


def test_a_newer_format_is_no_damage(tmp_path: Path, make_record: MakeRecord) -> None:
    path = path_of(tmp_path, "cpu")
    path.write_text('{"format": 2, "runs": []}\n', encoding="utf-8")
    assert repair(path) == []
    append(path, make_record("deqdet", 0, 40))
    records, (told,) = read(path)
    assert len(records) == 1 and "1 line is of a newer format than 1, and left out" in told


def test_records_of_before_a_field_was_there_are_read(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    path = path_of(tmp_path, "cpu")
    append(path, make_record("deqdet", 0, 40))
    line = json.loads(path.read_text())
    for name in ("place", "commit", "backbone"):
        del line[name]
    path.write_text(json.dumps({**line, "of_a_newer_code": 1}) + "\n")
    (record,), told = read(path)
    assert record.finished and record.place == record.commit == record.backbone == "" and not told


def test_an_ap_of_nothing_is_nan(make_record: MakeRecord) -> None:
    """As the evaluation gives it where there are no objects."""
    point = {"kind": "naive", "setting": "25", "steps": 25, "AP": float("nan")}
    record = make_record(
        "deqdet", 0, 40, epochs=[{"epoch": 1, "AP": None}], inference={"curve": [point]}
    )
    assert math.isnan(record.ap)
    at = record.ap_at(25)
    assert at is not None and math.isnan(at)


def test_figures_that_json_lacks_are_kept(tmp_path: Path, make_record: MakeRecord) -> None:
    record = make_record("deqdet", 0, 40, step_seconds=float("nan"))
    append(tmp_path / "x.jsonl", record)
    (found,), _ = read(tmp_path / "x.jsonl")
    assert found.step_seconds != found.step_seconds


def test_other_versions_are_counted_and_left_out(make_record: MakeRecord) -> None:
    records = [make_record("deqdet", 0, 40), make_record("deqdet", 1, 40, code="older")]
    records.append(make_record("deqdet", 2, 40, data={"digest": "other images"}))
    assert of_version(records, ("abc", "def")) == (records[:1], 2)
    assert of_version(records, ("abc", "def"), any_version=True) == (records, 2)


def test_a_finished_run_counts_before_a_failed_one(make_record: MakeRecord) -> None:
    fine = make_record("deqdet", 0, 40)
    failed = replace(fine, status="failed", reason="TrainingError: no")
    key = fine.run, 0
    assert latest([failed, fine])[key] is latest([fine, failed])[key] is fine
    assert latest([failed])[key] is failed and by_arm([failed]) == {}


def test_arms_share_a_run_and_settings_do_not_mix(make_record: MakeRecord) -> None:
    both = make_record("deqdet", 0, 40, arms=["deqdet", "rag-2"])
    assert by_arm([both]) == {"deqdet": {0: both}, "rag-2": {0: both}}
    longer = make_record("deqdet", 1, 44, run="other settings", arms=["deqdet"])
    assert by_arm([both, longer]) == {"deqdet": {1: longer}, "rag-2": {0: both}}


def test_the_date_decides_and_not_the_place_in_the_file(make_record: MakeRecord) -> None:
    first = make_record("deqdet", 0, 40, date="2026-11-27T10:00:00+00:00")
    second = replace(first, date="2026-11-28T10:00:00+00:00", seed=1)
    other = replace(first, date="2026-11-27T20:00:00+00:00", run="other settings")
    for records in ([first, other, second], [second, first, other], [other, second, first]):
        assert by_arm(records) == {"deqdet": {0: first, 1: second}}
    again = replace(first, date="2026-11-29T10:00:00+00:00")
    assert latest([again, first])[first.run, 0] is again


def test_a_result_of_former_code_does_not_cover_up_a_failure(make_record: MakeRecord) -> None:
    former = make_record("deqdet", 0, 40, code="older", date="2026-11-26T10:00:00+00:00")
    failed = make_record("deqdet", 0, 40, status="failed")
    assert latest([former, failed])[failed.run, 0] is failed and by_arm([former, failed]) == {}
    fine = make_record("deqdet", 1, 41)
    assert by_arm([former, fine]) == {"deqdet": {0: former, 1: fine}}
    newer = replace(former, code="abc", date="2026-11-25T10:00:00+00:00")
    assert by_arm([newer, former, fine])["deqdet"][0] is newer  # of the version of the newest run


def test_a_run_without_ap_has_none(make_record: MakeRecord) -> None:
    record = make_record("deqdet", 0, 40, epochs=[{"epoch": 1, "AP": None}])
    assert record.ap != record.ap


# -- versions ------------------------------------------------------------------------------------


def test_what_is_said_of_code_is_not_the_code() -> None:
    source = 'def f(x):\n    """Said."""\n    return x + 1  # one more\n'
    same = "def f(x):\n\n    return (x +\n            1)\n"
    assert versions.stripped(source) == versions.stripped(same)
    for other in (source.replace("+ 1", "+ 2"), source.replace("x", "y"), source + "f(1)\n"):
        assert versions.stripped(other) != versions.stripped(source)


def test_the_modules_that_decide_a_run() -> None:
    modules = versions.deciding()
    for name in (
        "implicit.supervision",
        "implicit.solvers.naive",
        "implicit.gradients.unrolled",
        "detection.models.decoders",
        "detection.decoder.layer",
        "detection.training.step",
        "detection.training.losses",
        "detection.training.optimization",
        "detection.data.transforms",
        "detection.evaluation",
    ):
        assert name in modules
    for name in modules:
        assert not name.startswith(("detection.commands", "detection.report", "implicit.interop"))
        assert name not in versions.APART
    for name in versions.APART:  # none that was renamed
        path = versions.ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").exists() or path.is_dir(), name


def test_a_fingerprint_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(body: str) -> str:
        package = tmp_path / "detection" / "training"
        package.mkdir(parents=True, exist_ok=True)
        (package / "loop.py").write_text("import detection.part\nfrom detection import part\n")
        (tmp_path / "detection" / "part.py").write_text(body)
        monkeypatch.setattr(versions, "ROOT", tmp_path)
        versions.fingerprint.cache_clear()
        try:
            return versions.fingerprint()
        finally:
            versions.fingerprint.cache_clear()

    first = fingerprint("x = 1\n")
    assert first == fingerprint("'''Said.'''\nx = 1  # so\n") != fingerprint("x = 2\n")
    assert len(first) == 12


def test_empty_fields_do_not_count() -> None:
    """Versions of Python add fields to the syntax tree, which are empty in code of before."""
    node = ast.parse("def f(): return 1")
    assert "type_params" not in versions._text(node)
