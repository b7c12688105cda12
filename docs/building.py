"""What the site needs beyond its pages: docstrings and pictures from elsewhere.

In the code a public name stands between single backticks, and what is shown to
run stands under ``Example:``.  Here the one becomes a link and the other what
the site shows as a session.  The pages refer to ``benchmarks/results/`` where
it lies in the repository, outside of the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

_RESULTS = "benchmarks/results/"
_NAME = re.compile(r"(?<![`\[])`(\w+)((?:\.\w+)*)`(?!`)")


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed; shows what defaults are."""

    def on_function_instance(
        self, *, func: griffe.Function, **kwargs: Any
    ) -> None:
        """Put the value of a constant in the place of its private name."""
        for parameter in func.parameters:
            constant = func.module.members.get(str(parameter.default))
            if isinstance(constant, griffe.Attribute):
                parameter.default = constant.value

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``, if it has one."""
        if obj.docstring is None:
            return
        package = obj.package
        public = {str(name) for name in package.exports or ()}

        def link(match: re.Match[str]) -> str:
            name, rest = match.groups()
            if name not in public:
                return match.group()
            path = f"{package.name}.{name}"
            # The function, where a module of the same name holds it.
            if Path(str(package.filepath)).with_name(f"{name}.py").exists():
                path = f"{path}.{name}"
            return f"[`{name}{rest}`][{path}{rest}]"

        text = re.sub(
            r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
        )
        obj.docstring.value = _NAME.sub(link, text)


def on_files(files: Files, config: Any) -> Files:
    """Hand the pictures of the benchmarks to mkdocs."""
    for picture in sorted(
        Path(config.config_file_path).parent.glob(f"{_RESULTS}*.png")
    ):
        files.append(
            File.generated(
                config, _RESULTS + picture.name, abs_src_path=str(picture)
            )
        )
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Refer to them where they lie in the site."""
    return markdown.replace(f"](../{_RESULTS}", f"]({_RESULTS}")
