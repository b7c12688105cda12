"""Run one target under atheris: ``python tests/fuzz coco -max_total_time=150``.

The first argument is the target, all others are libFuzzer's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    import atheris
    import torch  # noqa: F401  (imported before the instrumentation, which it does not need)
    import torchvision  # noqa: F401

    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
    with atheris.instrument_imports(include=["detection.data", "yaml", "defusedxml", "PIL"]):
        from fuzz.targets import TARGETS, run

    target, *options = sys.argv[1:]
    if target not in TARGETS:
        sys.exit(f"{target}: no target; choose one of {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "data"
        atheris.Setup(
            [sys.argv[0], *options, str(HERE / "corpus" / target)],
            lambda data: run(target, data, place),
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
