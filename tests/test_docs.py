"""The site says what is true: its Python runs, its links lead somewhere, and it builds."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import implicit
from benchmarks import comparison

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


# A block of Python, and the block of text that follows at once, if one does: what it prints.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run_and_print_what_follows_them(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # An indented or titled block would escape the pattern, and so be shown without having run.
    assert len(BLOCK.findall(text)) == text.count("```py")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        code = compile("\n" * line + block[1], str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        if block[2] is not None:
            assert printed.getvalue() == block[2], f"{page}, line {line}"


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.search(r"^nav:\n((?: .*\n)+)", text, flags=re.MULTILINE)
    assert nav
    assert sorted(re.findall(r"\S+\.md", nav[1])) == sorted(map(name_of, PAGES))


def test_every_public_name_is_in_the_api() -> None:
    shown = re.findall(
        r"^::: implicit\.(?:\w+\.)?(\w+)$",
        "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")),
        flags=re.MULTILINE,
    )
    assert sorted(shown) == sorted(implicit.__all__)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.split("#")[0]).is_file(), target


def test_every_example_is_told_of() -> None:
    text = (DOCS / "examples.md").read_text(encoding="utf-8")
    for script in (ROOT / "examples").glob("*.py"):
        assert f"`{script.name}`" in text


def test_every_difference_has_a_test() -> None:
    text = (DOCS / "differences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \|$", text.split("## Two variants")[0], flags=re.MULTILINE)[2:]
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "detection").glob("*.py"))
    assert len(rows) == 8
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.rsplit(" | ", 1)[1])
        assert names
        for name in names:
            assert f"def {name}(" in tests, name


def table_after(heading: str) -> list[list[str]]:
    """The first table below a heading of the comparison, its head included."""
    text = (DOCS / "comparison.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    rows = re.findall(r"^\| (.+) \|$", text.split("\n## ")[0], flags=re.MULTILINE)
    return [row.split(" | ") for row in (rows[0], *rows[2:])]


def results(name: str) -> Any:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def test_robustness_is_what_was_measured() -> None:
    found = results("robustness")
    common, problems = len(found["common"]), len({run["problem"] for run in found["runs"]})
    head = [
        "solver",
        f"solved, of {problems}",
        f"evaluations on the {common} that all but Naive solve",
    ]
    totals = found["evaluations_on_common"]
    rows = [
        [name, str(count), "–" if name == "Naive" else str(totals[name])]
        for name, count in found["solved"].items()
    ]
    assert table_after("Robustness") == [head, *rows]


def test_mixed_batches_are_what_was_measured() -> None:
    (_, *batches), *rows = table_after("Mixed batches")
    ratios = {(x["solver"], x["batch"]): f"{x['ratio']:.2f}" for x in results("mixed_batches")}
    assert len(ratios) == len(rows) * len(batches)
    for solver, *shown in rows:
        assert shown == [ratios[solver, batch] for batch in batches]


def test_gradient_errors_are_what_was_measured() -> None:
    (_, *norms), *rows = table_after("Gradient error")
    modes = results("gradient_error")["modes"]
    errors = {(x["gradient"], f"{x['contraction']:g}"): f"{x['error']:.1e}" for x in modes}
    assert {name for name, _ in errors} == {row[0] for row in rows}
    for name, *shown in rows:
        assert shown == [errors[name, norm] for norm in norms]


def test_overhead_is_what_was_measured() -> None:
    runs = {(x["solver"], x["batch"], x["dim"], x["stop"]): x for x in results("overhead")}
    _, *rows = table_after("Overhead")
    assert 3 * len(rows) == len(runs)
    for solver, size, *shown in rows:
        batch, dim = map(int, size.strip("()").split(", "))
        ours, fixed, peer = (
            runs[solver, batch, dim, stop] for stop in ("Tolerance", "Steps", "torchdeq")
        )
        assert shown == [
            f"{ours['ratio']:.2f}",
            f"{fixed['ratio']:.2f}",
            f"{ours['operations']:.0f} ({peer['operations']:.0f})",
            f"{ours['copies']:.1f} ({peer['copies']:.1f})",
        ]


def test_the_comparison_is_written_by_its_command() -> None:
    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    assert comparison.written(page, ROOT / "benchmarks" / "results") == page


def test_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip('needs pip install ".[docs]"')
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert (tmp_path / "index.html").is_file()
