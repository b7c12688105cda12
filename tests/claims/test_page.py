"""Tables say what the records say, and the page what the tables say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.claims import page, plots, studies, tables
from benchmarks.claims.results import Record, append, by_arm, path_of

MakeRecord = Callable[..., Record]
DEQDET = ["deqdet", "deqdet-as-rnndet", "rag-2", "multi-step"]
APS = {
    "adamixer": (40.0, 40.2, 40.4),
    "rnndet-6": (42.0, 41.8, 42.2),
    "deqdet": (45.0, 45.4, 45.2),
    "quiet": (44.9, 45.5, 45.3),
    "quiet-jfb": (43.2, 43.9, 43.6),
}


@pytest.fixture
def records(make_record: MakeRecord) -> list[Record]:
    return [
        make_record(arm, seed, ap, arms=DEQDET if arm == "deqdet" else [arm])
        for seed in range(3)
        for arm, ap in ((arm, aps[seed]) for arm, aps in APS.items())
    ]


def cells(sheet: tables.Sheet) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(sheet.head, row, strict=True)) for row in sheet.rows}


def test_verdicts_are_those_of_the_differences(records: list[Record]) -> None:
    """RAG(2) − JFB by seed: 1.7, 1.6, 1.7, mean 1.67 ± 0.14; with and without noise 0.1 ± 0.2."""
    found = cells(tables.verdicts(by_arm(records)))
    rag = found["RAG(2) beats JFB by at least 1 AP, both without perturbation"]
    assert (rag["here"], rag["seeds"], rag["verdict"]) == ("+1.7 ± 0.1", "3", "holds")
    rap = found["Multi-step perturbation brings at least 0.5 AP"]
    assert (rap["the paper's difference"], rap["verdict"]) == ("+1.2", "does not hold")
    assert found["DEQDet is ahead of RNNDet with T = 6"]["verdict"] == "holds"
    assert "RNNDet with T = 20 falls behind T = 12" not in found


def test_a_table_has_the_papers_figures_beside(records: list[Record]) -> None:
    sheet = next(s for s in tables.sheets(by_arm(records)) if s.title.startswith("Table 2"))
    found = cells(sheet)
    assert list(found) == [
        "AdaMixer, NF = 6",
        "RNNDet, NF = 6",
        "DEQDet, NF = 6",
        "DEQDet, NF = 25",
    ]
    assert (found["AdaMixer, NF = 6"]["paper's AP"], found["AdaMixer, NF = 6"]["AP"]) == (
        "42.7",
        "40.2 ± 0.5",
    )
    six = found["DEQDet, NF = 6"]
    assert six["AP"] == "43.8 ± 0.5"  # 45.2 less a seventh of 10
    assert (six["images/s"], six["parameters"], six["training memory"]) == (
        "9.0",
        "1.80 M",
        "1 MiB",
    )
    assert six["minutes"] == "5.0"  # of the processor, half of those on the wall


def test_results_of_another_version_are_marked(records: list[Record]) -> None:
    mixed = [replace(r, code="older") if r.arms == ["quiet"] else r for r in records]
    (sheet,) = (s for s in tables.sheets(by_arm(mixed)) if s.title.startswith("Table 4e"))
    assert list(cells(sheet)) == ["/ *", "multi-step"]


def test_a_lone_row_is_no_table(records: list[Record]) -> None:
    titles = {sheet.title.split(":")[0] for sheet in tables.sheets(by_arm(records))}
    assert titles == {"Claims", "Table 2", "Table 4c", "Table 4e"}
    assert tables.sheets({}) == []


def test_studies(records: list[Record]) -> None:
    gradients, refined, residuals, fixed = studies.studies(by_arm(records))
    assert cells(gradients)["DEQDet"]["deviation over mean"] == "10.6 ± 0.0 %"
    assert [row[1] for row in refined.rows] == ["0", "6", "25"]
    assert cells(residuals)["DEQDet"]["refinement 25"] == "0.2 (0.1 to 0.3)"
    assert "AdaMixer" not in cells(fixed)
    assert cells(fixed)["RNNDet, T = 6"]["spectral radius"] == "0.70"
    assert cells(fixed)["RNNDet, T = 6"]["same detections"] == "90 %"


def test_plots_are_drawn_of_what_there_is(tmp_path: Path, records: list[Record]) -> None:
    drawn = plots.draw(by_arm(records), tmp_path, "cpu")
    names = ("epochs", "gradients", "refinements", "residuals", "rows")
    assert [path.name for path in drawn] == [f"claims-cpu-{name}.png" for name in names]
    alone = [record for record in records if record.arms == ["adamixer"]]
    assert len(plots.draw(by_arm(alone), tmp_path, "other")) == 2  # no path to refine along


def test_the_page_is_that_of_the_results(tmp_path: Path, records: list[Record]) -> None:
    for record in [replace(records[0], code="older"), *records]:
        append(path_of(tmp_path, "cpu"), record)
    append(path_of(tmp_path, "cpu"), replace(records[0], seed=7, status="failed", reason="Why."))
    text = "Before.\n<!-- claims: cpu -->\nold\n<!-- end of claims: cpu -->\nAfter.\n"
    made = page.written(text, tmp_path)
    assert made.startswith("Before.\n<!-- claims: cpu -->\n\n*15 runs of 2 epochs on 8 images")
    assert made.endswith("<!-- end of claims: cpu -->\nAfter.\n") and "old\n" not in made
    assert "Left out, of other code or data: 1." in made
    assert "| RNNDet with T = 6 is ahead of AdaMixer | Table 2 | +0.7 | +1.8 ± 0.5 | 3 | holds |" in made  # fmt: skip  # noqa: E501
    assert "Not measured at this size: RAG(2) beats JFB by at least 1 AP; " in made
    assert "Failed: adamixer, seed 7: Why." in made
    assert page.written(made, tmp_path) == made
    assert "*Not measured yet.*" in page.written(made, tmp_path / "empty")


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="has not the marks"):
        page.put("text", "cpu", "content")


def test_the_page_in_the_documentation_is_up_to_date() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text, page.RESULTS) == text, "python -m benchmarks.claims.page"
    assert all(page.BEGIN.format(name) in text for name in ("cpu", "gpu", "coco"))
