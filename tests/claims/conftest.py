"""Records to show and to judge, without a run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.claims.results import Record

MakeRecord = Callable[..., Record]


@pytest.fixture
def make_record() -> MakeRecord:
    """A finished record of an arm: its AP in per cent, and whatever else is to differ."""

    def make(arm: str, seed: int, ap: float, **more: object) -> Record:
        tied = arm != "adamixer"
        kind = "naive" if tied else "layers"
        curve = [
            {"kind": kind, "setting": str(n), "steps": n, "AP": ap / 100 - 0.1 / (n + 1)}
            for n in (0, 6, 25)
        ]
        apart = {"start_content": 1.4, "start_boxes": 30.0, "content": 0.1, "boxes": 2.0}
        look = {
            "content": [1e-2, 5e-3, 2e-3, 1e-3],
            "boxes": [0.1] * 4,
            "rate": 0.98,
            "radius": 0.7,
            "anderson": 1e-4,
            "from": {
                "boxes moved": {**apart, "agreeing": 1.0},
                "no first layer": {**apart, "agreeing": 0.8},
            },
        }
        spread = {
            "percentiles": [5, 50, 95],
            "content": [[0.1, 0.2, 0.3]] * 25,
            "state": [[0.01, 0.02, 0.03]] * 25,
        }
        study = {"residuals": {**spread, "boxes": [[1, 2, 3]] * 25}, "fixed_point": [look]}
        fields: dict[str, object] = {
            "run": f"run of {arm}",
            "arms": [arm],
            "seed": seed,
            "status": "finished",
            "code": "abc",
            "data": {
                "kind": "scenes",
                "train_images": 8,
                "val_images": 4,
                "val_objects": 20,
                "classes": 24,
                "digest": "def",
            },
            "recipe": {"optimization": {"epochs": 2}},
            "versions": {},
            "device": "a machine",
            "threads": 1,
            "jobs": 2,
            "date": f"2026-11-27T10:00:0{seed}+00:00",
            "parameters": 1_800_000,
            "epochs": [{"epoch": n, "AP": ap * n / 200, "AP50": 0.5} for n in (1, 2)],
            "per_class": {"A": ap / 100, "coin": ap / 200, "face": None},
            "history": {
                "step": [1, 2],
                "loss": [2.0, 1.0],
                "norm": [9.0, 8.0],
                "norm_deviation": [1.0, 0.8],
                "norm_most": [11.0, 9.0],
            },
            "step_seconds": 2.0,
            "step_processor_seconds": 1.0,
            "training_minutes": 10.0,
            "memory": {"train": 2**20, "inference": 2**20},
            "rates": {"own": 5.0, "6": 9.0, "25": 3.0},
            "inference": {"curve": curve, **(study if tied else {})},
        }
        return Record(**{**fields, **more})  # type: ignore[arg-type]

    return make
