"""Writes what was found into ``docs/claims.md``, between the marks of each preset.

    python -m benchmarks.claims.page

Tables and plots are those of the newest version of code and data in ``benchmarks/results``; the
words around them are a person's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.plots import draw
from benchmarks.claims.results import Record, by_arm, of_version, path_of, read
from benchmarks.claims.statements import CLAIMS
from benchmarks.claims.studies import studies
from benchmarks.claims.tables import ap_of, sheets

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "claims.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- claims: {} -->", "<!-- end of claims: {} -->"
PLOTS = {
    "rows": "Rows of the paper's tables beside DEQDet in full",
    "epochs": "AP over epochs",
    "gradients": "Gradient norm over training",
    "refinements": "AP over refinements at inference",
    "residuals": "Change of the contents over refinements",
}


def newest(path: Path) -> tuple[list[Record], int]:
    """The results of the newest version, and how many others there are."""
    records, _ = read(path)
    return of_version(records, records[-1].version) if records else ([], 0)


def block(results: Path, name: str) -> str:
    """What stands between the marks of a preset; ``name`` is that of the preset."""
    records, others = newest(path_of(results, name))
    if not records:
        return "*Not measured yet.*"
    found = by_arm(records)
    parts = [
        _origin(records, others),
        *(sheet.markdown() for sheet in (*sheets(found), *studies(found))),
    ]
    missing = [
        claim.statement
        for claim in CLAIMS
        if not set(ap_of(found, claim.better)) & set(ap_of(found, claim.worse))
    ]
    if missing:
        parts.insert(2, f"Not measured at this size: {'; '.join(missing)}.")
    failed = [record for record in records if not record.finished]
    if failed:
        reasons = "; ".join(f"{r.arms[0]}, seed {r.seed}: {r.reason}" for r in failed)
        parts.append(f"Failed: {reasons}.")
    plots = [
        f"![{text}](../benchmarks/results/claims-{name}-{plot}.png)"
        for plot, text in PLOTS.items()
        if (results / f"claims-{name}-{plot}.png").exists()
    ]
    return "\n\n".join([*parts, *plots])


def _origin(records: Sequence[Record], others: int) -> str:
    last = records[-1]
    settings = last.recipe["optimization"]
    text = (
        f"*{len([r for r in records if r.finished])} runs of {settings['epochs']} epochs on "
        f"{last.data['train_images']} images of {last.data['kind']} ({last.data['classes']} "
        f"classes; {last.data['val_objects']} objects on {last.data['val_images']} images to "
        f"validate on), up to {last.date[:10]}; {last.device}, {last.jobs} runs at once; code "
        f"{last.code}, data {last.data['digest']}."
    )
    if others:
        text += f" Left out, of other code or data: {others}."
    return f"{text}*"


def put(text: str, name: str, content: str) -> str:
    """The page with something else between the marks of a preset.

    Raises:
        ValueError: if the page has no such marks.
    """
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"The page has not the marks {begin} and {end} once each.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def written(text: str, results: Path) -> str:
    """The page as the results have it."""
    for name in re.findall(r"<!-- claims: (\w+) -->", text):
        text = put(text, name, block(results, name))
    return text


def main() -> None:
    """Draw the plots; write the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- claims: (\w+) -->", text):
        records, _ = newest(path_of(RESULTS, name))
        if records:
            draw(by_arm(records), RESULTS, name)
    PAGE.write_text(written(text, RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
