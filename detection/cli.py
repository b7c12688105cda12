"""The command line, ``deqdet`` or ``python -m detection``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from rich.console import Console
from rich.table import Table

COMMANDS = {
    "train": "train a detector on a folder of labelled images, or go on with a run",
    "evaluate": "score a checkpoint with COCO's metrics",
    "report": "tell what a run has come to, on one HTML page",
    "predict": "detect objects in images and videos",
    "check-data": "report what a data set holds and what is wrong with it",
    "recipes": "list the recipes: sizes, schedules, published AP",
    "convert": "take over a published checkpoint",
    "export": "write a checkpoint as ONNX or as a program of torch.export",
    "benchmark": "time a detector on this machine",
}
"""What there is, in the order of use; `detection.commands` has a module for each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Example:
        >>> main(["trian"])
        2
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        _help(Console(highlight=False))
        return 0 if given else 2
    name, *rest = given
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" There are {', '.join(COMMANDS)}."
        Console(stderr=True).print(
            f"error: there is no command {name!r}.{hint}", style="red", highlight=False
        )
        return 2
    # Only now what the command needs: it is seconds until PyTorch has been loaded.
    return int(import_module("detection.commands.running").run(name, rest))


def _help(console: Console) -> None:
    console.print("usage: deqdet COMMAND …\n\nDEQDet and its relatives: object detectors.\n")
    table = Table.grid(padding=(0, 2))
    for name, purpose in COMMANDS.items():
        table.add_row(f"  {name}", purpose)
    console.print(table)
    console.print("\ndeqdet COMMAND --help tells the options of a command.")
