"""Configurations to JSON and back: nested frozen dataclasses, with nothing lost or guessed.

Where a field may hold one of several types (a solver, a gradient, a decoder), the JSON names the
type.  Reading is strict: an unknown field or a value of the wrong kind is refused by its full name,
and so is a missing field that has no default.  One that has a default takes it: a field that a
later version adds must keep, by its default, what earlier versions did, and what these have written
stays readable.  A type whose fields have come to mean something else says in ``from_earlier`` what
those that an earlier version has written stand for.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigurationError(ValueError):
    """A stored configuration that does not fit the code."""


def to_json(value: Any) -> Any:
    """A configuration as JSON types; dataclasses carry their type's name.

    Example:
        >>> import implicit
        >>> to_json(implicit.Neumann(2))
        {'type': 'Neumann', 'k': 2}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], data: Any, where: str = "") -> T:
    """The configuration of type ``kind`` that `to_json` made ``data`` from.

    Raises:
        ConfigurationError: naming the field that does not fit.

    Example:
        >>> import implicit
        >>> from_json(implicit.Neumann, {"type": "Neumann", "k": 3})
        Neumann(k=3)
    """
    value: T = _read(kind, data, where or kind.__name__)
    return value


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_union(options, data, where)
    if inspect.isabstract(kind):  # a solver of any kind, say
        return _read_union(tuple(kind.__subclasses__()), data, where)
    if origin is typing.Literal:
        if not any(type(data) is type(option) and data == option for option in options):
            raise ConfigurationError(
                f"{where}={data!r}: must be one of {', '.join(map(str, options))}."
            )
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise ConfigurationError(f"{where}={data!r}: must be a list.")
        inner = [options[0]] * len(data) if options[-1] is Ellipsis else list(options)
        if len(inner) != len(data):
            raise ConfigurationError(f"{where}: {len(inner)} values are needed, got {len(data)}.")
        items = zip(inner, data, strict=True)
        return tuple(_read(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(items))
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise ConfigurationError(f"{where}={data!r}: must be {getattr(kind, '__name__', kind)}.")
    return data


def _read_union(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    if len(rest) == 1:
        return _read(rest[0], data, where)
    plain = [option for option in rest if not inspect.isclass(option) or option in (int, float)]
    if len(plain) == len(rest):
        return _read_plain(plain, data, where)
    names = {option.__name__: option for option in rest}
    name = data.get("type") if isinstance(data, dict) else None
    if name not in names:
        raise ConfigurationError(f"{where}: type {name!r} is not one of {', '.join(names)}.")
    return _read(names[name], data, where)


def _read_plain(options: list[Any], data: Any, where: str) -> Any:
    """A number or one of some words."""
    refusals = []
    for option in options:
        try:
            return _read(option, data, where)
        except ConfigurationError as error:
            refusals.append(str(error).removeprefix(f"{where}={data!r}: must be ").rstrip("."))
    raise ConfigurationError(f"{where}={data!r}: must be {', or '.join(refusals)}.")


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigurationError(
            f"{where}={data!r}: must be an object with the fields of {kind.__name__}."
        )
    if data.get("type", kind.__name__) != kind.__name__:
        raise ConfigurationError(f"{where}: type {data['type']!r} where {kind.__name__} is needed.")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    given = {key: value for key, value in data.items() if key != "type"}
    if hasattr(kind, "from_earlier"):
        given = kind.from_earlier(given)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(names)}."
            raise ConfigurationError(f"{where}.{key}: unknown field.{hint}")
    for field in dataclasses.fields(kind):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in given:
            raise ConfigurationError(f"{where}.{field.name}: missing.")
    values = {key: _read(hints[key], value, f"{where}.{key}") for key, value in given.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{where}: {error}") from error


def read_choice(text: str, options: tuple[type, ...]) -> Any:
    """One of several configuration types from its call, ``Anderson(memory=3)``; nothing is run.

    Raises:
        ConfigurationError: if the text is no such call, naming what would be.

    Example:
        >>> import implicit
        >>> read_choice("Neumann(k=3)", (implicit.RAG, implicit.Neumann))
        Neumann(k=3)
    """
    names = {option.__name__: option for option in options}
    hint = f"use one of {', '.join(f'{name}(…)' for name in names)}, with arguments by name"
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        call = None
    if isinstance(call, ast.Name):
        call = ast.Call(call, [], [])
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ConfigurationError(f"{text!r} cannot be read: {hint}.")
    if call.func.id not in names:
        raise ConfigurationError(f"There is no {call.func.id!r} here: {hint}.")
    try:
        values = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except ValueError as error:
        raise ConfigurationError(f"{text!r}: arguments must be plain values.") from error
    return from_json(
        names[call.func.id],
        {**_defaults(names[call.func.id]), **values},
        call.func.id,
    )


def _defaults(kind: Any) -> dict[str, Any]:
    fields = dataclasses.fields(kind)
    given = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    made = {
        f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING
    }
    return {name: to_json(value) for name, value in {**given, **made}.items()}
