"""From words to options: one reader for all commands, with solvers and gradients as options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast, get_args

import tyro

from detection.commands.console import is_main
from detection.configuration import read_choice
from detection.models.config import Gradient, Solver

T = TypeVar("T")


def read(
    kind: type[T],
    arguments: Sequence[str],
    *,
    prog: str,
    default: T | None = None,
    description: str | None = None,
) -> T:
    """The command of type ``kind`` that the arguments describe.

    Args:
        kind: a dataclass; its docstring is the help.
        arguments: without the name of the program.
        prog: that name, for the help.
        default: where options begin from.
        description: help in place of the docstring.

    Raises:
        SystemExit: after help (0), or after saying which option is wrong (2).
    """
    with _choices():
        found = tyro.cli(
            kind,
            prog=prog,
            args=arguments,
            default=default,
            description=description,
            config=(tyro.conf.AvoidSubcommands,),
            console_outputs=is_main(),
        )
    return cast(T, found)


def check_threshold(threshold: float) -> None:
    """Raise `ValueError` where ``--threshold`` is no score.

    Example:
        >>> check_threshold(0.3)
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold {threshold}: must lie in [0, 1].")


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The last value that an option has among the arguments, before they are read.

    Example:
        >>> value_of("--recipe", ["--recipe", "a", "--seed", "1", "--recipe=b"])
        'b'
    """
    value = None
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value


def _choices() -> tyro.constructors.ConstructorRegistry:
    """Solvers and gradients as options: ``--model.decoder.solver "Anderson(memory=3)"``."""
    rules = tyro.constructors.ConstructorRegistry()

    @rules.primitive_rule
    def choice(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[object] | None:
        members = get_args(info.type)
        options = tuple(member for member in members if member is not type(None))
        if not options or not set(options) <= {*get_args(Solver), *get_args(Gradient)}:
            return None
        optional = len(options) < len(members)
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="|".join([f"{o.__name__}(…)" for o in options] + ["None"] * optional),
            instance_from_str=lambda texts: (
                None if optional and texts[0] == "None" else read_choice(texts[0], options)
            ),
            is_instance=lambda value: isinstance(value, members),
            str_from_instance=lambda value: [repr(value)],
        )

    return rules
