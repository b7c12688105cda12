"""Writes what was found into ``docs/claims.md``, between the marks of each preset.

    python -m benchmarks.claims.page

Tables and plots are those of the newest version of code and data in ``benchmarks/results``, at the
settings that the presets have now; the words around them are a person's.  The verdicts of the
preset ``cpu`` stand in the project's README too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.former import as_now
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
from benchmarks.claims.tables import ap_of, sheets, verdicts
from benchmarks.pages import put, table

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "claims.md", ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MARK, IN_README = "claims: {}", "verdicts of the claims"
"""What the marks are called: of a preset on the page, and in the project's README."""
NOTHING = "*Not measured yet.*"
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
    stored, _ = read(path_of(results, name))
    size = PRESETS[name]
    records, wanted = [as_now(record, size) for record in stored], size.runs()
    ordered = in_order(record for record in records if record.run in wanted)
    if not ordered:
        return [], len(records)
    same, _ = of_version(ordered, ordered[-1].version)
    return same, len(records) - len(same)


def block(results: Path, name: str) -> str:
    """What stands between the marks of a preset; ``name`` is that of the preset."""
    records, others = counting(results, name)
    if not records:
        return NOTHING
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
    codes = dict.fromkeys(record.versions.get("code", record.code) for record in records)
    devices = " and ".join(dict.fromkeys(record.device for record in finished or records))
    text = (
        f"*{len(finished)} runs of {settings['epochs']} epochs on "
        f"{last.data['train_images']} images of {last.data['kind']} ({last.data['classes']} "
        f"classes; {last.data['val_objects']} objects on {last.data['val_images']} images to "
        f"validate on), up to {last.date[:10]}; {devices}, {last.jobs} runs at once; code "
        f"{' and '.join(codes)}, data {last.data['digest']}."
    )
    if others:
        text += f" Left out, of other code, data or settings: {others}."
    return f"{text}*"


def written(text: str, results: Path) -> str:
    """The page as the results have it."""
    for name in presets_of(text):
        text = put(text, MARK.format(name), block(results, name))
    return text


def presets_of(text: str) -> list[str]:
    """The presets that the page has marks for."""
    return re.findall(rf"<!-- {MARK.format('([a-z]+)')} -->", text)


def with_verdicts(readme: str, results: Path) -> str:
    """The project's README with the verdicts of the preset ``cpu``."""
    records, _ = counting(results, "cpu")
    sheet = verdicts(by_arm(records))
    content = table([sheet.head, *sheet.rows]) if sheet.rows else NOTHING
    return put(readme, IN_README, content)


def main() -> None:
    """Draw the plots; write the page, and the verdicts into the README."""
    text = PAGE.read_text(encoding="utf-8")
    for name in presets_of(text):
        records, _ = counting(RESULTS, name)
        if records:
            draw(by_arm(records), RESULTS, name)
    PAGE.write_text(written(text, RESULTS), encoding="utf-8")
    README.write_text(with_verdicts(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
