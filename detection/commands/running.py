"""From the name of a command and its words to its exit status."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from rich.console import Console

from detection.commands.base import Command
from detection.commands.console import FAILED, Stopped, output, told
from detection.commands.options import read
from detection.distributed import init_from_environment


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command of a name; returns its exit status.

    Args:
        name: as on the command line.
        arguments: its words.

    Example:
        >>> run("recipes", ["--help"])  # doctest: +ELLIPSIS
        usage: deqdet recipes ...
        0
    """
    kind = command_named(name)
    try:
        with told(by_all=True):
            default = kind.begun(arguments)
            command = read(kind, arguments, prog=f"deqdet {name}", default=default)
    except SystemExit as stop:  # after help, or after a refusal
        return stop.code if isinstance(stop.code, int) else FAILED
    return execute(command, output())


def command_named(name: str) -> type[Command]:
    """The class of a command; its module has the same name.

    Example:
        >>> command_named("check-data").__name__
        'CheckData'
    """
    module = import_module(f"detection.commands.{name.replace('-', '_')}")
    kind: type[Command] = getattr(module, "".join(word.capitalize() for word in name.split("-")))
    return kind


def execute(command: Command, console: Console) -> int:
    """Check a command's options, join the processes, do the work; returns the exit status."""
    try:
        with told(by_all=True):
            command.check()
        with told(command.interrupted), init_from_environment(command.device) as distributed:
            command.run(distributed, console)
    except Stopped as stopped:
        return int(stopped.code or 0)
    return 0
