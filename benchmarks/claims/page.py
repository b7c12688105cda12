"""Writes what was found into ``docs/claims.md``, between the marks of each preset.

    python -m benchmarks.claims.page

Tables and plots are those of the newest version of code and data in ``benchmarks/results``, at the
settings that the presets have now; the words around them are a person's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.plots import draw
from benchmarks.claims.presets import PRESETS
from benchmarks.claims.results import (
    Record,
    by_arm,
    in_order,
    latest,
    of_version,
    path_of,
    read,
)
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


def counting(results: Path, name: str) -> tuple[list[Record], int]:
    """The results of a preset that belong together, and how many others there are.

    They are those of the runs that the preset has now, of the newest version; by date.
    """
    records, _ = read(path_of(results, name))
    wanted = PRESETS[name].runs()
    ordered = in_order(record for record in records if record.run in wanted)
    if not ordered:
        return [], len(records)
    same, _ = of_version(ordered, ordered[-1].version)
    return same, len(records) - len(same)


def block(results: Path, name: str) -> str:
    """What stands between the marks of a preset; ``name`` is that of the preset."""
    records, others = counting(results, name)
    if not records:
        return "*Not measured yet.*"
    found = by_arm(records)
    failed = [record for record in latest(records).values() if not record.finished]
    parts = [
        _origin(records, others),
        *(sheet.markdown() for sheet in (*sheets(found, failed), *studies(found))),
    ]
    missing = [
        claim.statement
        for claim in CLAIMS
        if not set(ap_of(found, claim.better)) & set(ap_of(found, claim.worse))
    ]
    if missing:
        parts.insert(2, f"Not measured at this size: {'; '.join(missing)}.")
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
    finished = [record for record in latest(records).values() if record.finished]
    settings = last.recipe["optimization"]
    devices = " and ".join(dict.fromkeys(record.device for record in finished or records))
    text = (
        f"*{len(finished)} runs of {settings['epochs']} epochs on "
        f"{last.data['train_images']} images of {last.data['kind']} ({last.data['classes']} "
        f"classes; {last.data['val_objects']} objects on {last.data['val_images']} images to "
        f"validate on), up to {last.date[:10]}; {devices}, {last.jobs} runs at once; code "
        f"{last.code}, data {last.data['digest']}."
    )
    if others:
        text += f" Left out, of other code, data or settings: {others}."
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
        records, _ = counting(RESULTS, name)
        if records:
            draw(by_arm(records), RESULTS, name)
    PAGE.write_text(written(text, RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
