"""What a run says while it trains: a live bar or plain lines, and a log as JSON lines.

On a terminal the bar is redrawn in place; elsewhere (a file, a pipe, a batch job) a plain line is
written now and then.  The log is for programs: one JSON object a line, whole after every write.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from detection.files import replacing

_SMOOTHING = 0.95


class Progress:
    """Tells how far a run is, what it measures, how long a step takes and what time is left.

    Args:
        total_steps: of the run.
        every: seconds between two lines where the output is not a terminal; the first and the
            last step always get one.
        done_steps: steps of an earlier run that is resumed; they do not count for the time.
        quiet: say nothing (processes other than the main one).
        console: where to write; standard output by default.
        clock: seconds, for tests.

    Example:
        >>> with Progress(2, console=Console(width=100)) as progress:
        ...     progress.note("Training on 2 images.")
        ...     progress.update(2, {"loss": 1.5, "lr": 1e-4})  # doctest: +ELLIPSIS
        Training on 2 images.
        step 2/2  loss 1.5  lr 0.0001  ... s/step  0:00:00 left
    """

    def __init__(
        self,
        total_steps: int,
        *,
        every: float = 10.0,
        done_steps: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.every, self.quiet, self.clock = total_steps, every, quiet, clock
        self.console = console or Console()
        self.step = done_steps
        self.step_time: float | None = None
        self.metrics: dict[str, float] = {}
        self._live: Live | None = None
        self._updated = clock()
        self._printed = -math.inf

    def __enter__(self) -> Progress:
        self._updated = self.clock()
        if self.console.is_terminal and not self.quiet:
            self._live = Live(get_renderable=self._draw, console=self.console)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Say that ``step`` steps are done, with new values for some of the metrics, if any.

        The step time is an exponential average over the steps since the last call.
        """
        now = self.clock()
        if step > self.step:
            each = (now - self._updated) / (step - self.step)
            keep = 0.0 if self.step_time is None else _SMOOTHING ** (step - self.step)
            self.step_time = keep * (self.step_time or 0.0) + (1 - keep) * each
        self.step, self._updated = step, now
        self.metrics.update(metrics or {})
        due = now - self._printed >= self.every or step >= self.total_steps
        if self._live is None and not self.quiet and due:
            self._printed = now
            self._print(f"step {step}/{self.total_steps}  {self._summary()}")

    def note(self, text: str) -> None:
        """Write a line of its own, above the bar."""
        if not self.quiet:
            self._print(text)
        # Evaluation and saving, which end in a note, are not part of the step time.
        self._updated = self.clock()

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _summary(self) -> str:
        parts = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.metrics.items()]
        if self.step_time is not None:
            left = round(self.step_time * max(self.total_steps - self.step, 0))
            hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
            parts.append(f"{self.step_time:.3g} s/step")
            parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
        return "  ".join(parts)

    def _draw(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(
            ProgressBar(total=max(self.total_steps, 1), completed=self.step),
            f"{self.step}/{self.total_steps}",
        )
        return Group(bar, Text(self._summary()))


class JsonLines:
    """A log of one JSON object a line, each handed to the system at once: a crash loses nothing.

    Opening appends.  A line that a crash cut short is removed, and so are, with ``keep``, the
    lines beyond so many, which a resumed run will write again.  Numbers that are not finite,
    which JSON lacks, become the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``;
    ``float(...)`` reads these, and `read_json_lines` turns them back.

    Args:
        path: the file; its folder is made.
        keep: how many of the lines that are there to keep; all by default.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> with JsonLines(path) as log:
        ...     log.write({"step": 1, "loss": float("nan")})
        >>> print(path.read_text(encoding="utf-8").strip())
        {"step": 1, "loss": "NaN"}
        >>> read_json_lines(path)
        [{'step': 1, 'loss': nan}]
    """

    def __init__(self, path: Path | str, keep: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _repair(self.path, keep)
        # Nothing is held back in a buffer: after a full disk, closing must not fail again.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record of strings, numbers, 0-d tensors, and mappings and lists of these.

        Raises:
            OSError: naming the file, if the disk is full or refuses.
        """
        rest = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}. Make room on the disk", str(self.path)
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """The records of a log, numbers that are not finite included.

    Raises:
        ValueError: naming the file and the line that is not JSON.
    """
    return [record for _, record in _parsed(Path(path))]


def _parsed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of a log, each with its record; a last line cut short is left out."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield line + "\n", restored(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error.msg}): the file is damaged, or not a "
                "log. Remove the line, or give another file."
            ) from None


def _repair(path: Path, keep: int | None) -> None:
    whole = "".join(line for line, _ in list(_parsed(path))[:keep])
    if whole.encode() != path.read_bytes():
        with replacing(path) as temporary:
            temporary.write_bytes(whole.encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    number = float(value)
    if math.isnan(number):
        return "NaN"
    return number if math.isfinite(number) else ("Infinity" if number > 0 else "-Infinity")


def restored(value: Any) -> Any:
    """With the numbers that JSON lacks, which `JsonLines` writes as words."""
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
