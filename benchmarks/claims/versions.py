"""Which code a result is of: a fingerprint of the modules that decide a training run.

It is that of the syntax tree, without comments, docstrings and layout, of the training loop, of
what teaches the backbone, and of everything that they import from this repository, but for what
only shows, stores or fetches.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN = ("detection.training.loop", "detection.data.folders", "benchmarks.claims.backbone")
PACKAGES = ("implicit", "detection", "benchmarks")
APART = (
    "detection.checkpoints",
    "detection.configuration",
    "detection.curves",
    "detection.data.checking",
    "detection.data.errors",
    "detection.data.problems",
    "detection.data.reading",
    "detection.data.splits",
    "detection.data.voc_folder",
    "detection.data.yolo_folder",
    "detection.drawing",
    "detection.files",
    "detection.sources",
    "detection.training.errors",
    "detection.training.fine_tuning",
    "detection.training.progress",
    "detection.training.provenance",
    "detection.training.tracking",
    "detection.visualization",
    "implicit.diagnostics",
    "implicit.interop",
)
"""Modules (with those inside them) that decide nothing of what a run ends with."""


@cache
def fingerprint() -> str:
    """Of the code as it stands, in twelve hexadecimal digits."""
    total = hashlib.sha256()
    for name, path in sorted(deciding().items()):
        total.update(f"{name} {stripped(path.read_text(encoding='utf-8'))}\n".encode())
    return total.hexdigest()[:12]


def deciding() -> dict[str, Path]:
    """The modules that decide a run, by name."""
    found: dict[str, Path] = {}
    waiting = list(BEGIN)
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if path is None or name in found or _is_apart(name):
            continue
        found[name] = path
        waiting += _imported(ast.parse(path.read_text(encoding="utf-8")))
    return found


def stripped(source: str) -> str:
    r"""What a module does, as text that comments, docstrings and layout do not change.

    Example:
        >>> stripped("x = 1  # one") == stripped("'''Said.'''\n\nx  =  1")
        True
    """
    return _text(ast.parse(source))


def _text(node: object) -> str:
    """Fields that are empty are left out, so that versions of Python that add some agree."""
    if isinstance(node, list):
        return "[" + ",".join(map(_text, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            value = [item for item in value if not _is_said(item)]
        if value is not None and value != []:
            fields.append(f"{name}={_text(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_said(node: ast.AST) -> bool:
    """Whether a statement is a string that stands alone."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if _path(name) is not None]
            yield from modules
            if len(modules) < len(inside):
                yield node.module


def _path(name: str) -> Path | None:
    if name.split(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _is_apart(name: str) -> bool:
    return any(name == apart or name.startswith(f"{apart}.") for apart in APART)
