"""Results of former code, as the present code takes them.

Settings are read as the present code reads stored ones.  A former version counts as the present one
where both were seen to train to the same bits; what it measured by a rule that is another now is
left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.claims.presets import Preset, with_backbone
from benchmarks.claims.results import Record
from benchmarks.claims.versions import fingerprint
from detection.configuration import ConfigurationError, from_json
from detection.training.recipe import Recipe


@dataclass(frozen=True)
class Alike:
    """A former version of the code that trains as another one does.

    Args:
        code: fingerprint of that other one.
        without: kinds of points of a record's ``inference`` that the two measure differently.
    """

    code: str
    without: tuple[str, ...] = ()


ALIKE = {"b51e79f1eeff": Alike("4938305c12d1", without=("auto",))}
"""By former fingerprint.  Where the code has changed since, an entry counts for nothing.

That `benchmarks.claims.bits` printed the same for both was seen on two cores of an AMD EPYC, with
torch 2.14.1; the rule of ``steps="auto"`` is another now.
"""


def as_now(record: Record, preset: Preset) -> Record:
    """A record of ``preset`` as the present code would have written it.

    One that was taken over has the fingerprint that it came with in ``versions["code"]``.
    """
    record = replace(record, run=_run_now(record, preset))
    alike = ALIKE.get(record.code)
    if alike is None or alike.code != fingerprint():
        return record
    curve = [p for p in record.inference.get("curve", ()) if p["kind"] not in alike.without]
    return replace(
        record,
        code=alike.code,
        versions={**record.versions, "code": record.code},
        inference={**record.inference, "curve": curve} if record.inference else {},
    )


def _run_now(record: Record, preset: Preset) -> str:
    """What the recipe of the record is called now; what it was, if there is no such recipe now."""
    try:
        made = from_json(Recipe, record.recipe)
    except ConfigurationError:
        return record.run
    if preset.teaching:  # then the weights are those that every run of the preset begins from
        made = with_backbone(made, "")
    return preset.identity(made)
