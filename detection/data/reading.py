"""Text files of a data set that nobody vouches for: read whole, but never more than a limit.

Names of image files come from such files as well; `inside` tells whether one stays in its folder.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, ParseError

from detection.data.problems import Problems

if TYPE_CHECKING:
    import yaml

MOST_JSON_BYTES = 1_000_000_000
"""Size of the largest JSON file that is parsed; COCO's own largest has 450 MB.

Parsing takes several times as much memory.  The environment variable
``DETECTION_MOST_JSON_BYTES`` sets another limit.
"""

MOST_TEXT_BYTES = 16_000_000
"""Size of the largest label file (YOLO), XML file (Pascal VOC) or list of names."""

MOST_YAML_BYTES = 1_000_000
"""Size of the largest ``data.yaml``."""

LONGEST_RUN = 16_000_000
"""Bytes of JSON between two closing brackets: a polygon of two million corners is none."""

READABLE_KEYS = frozenset(
    ("images", "annotations", "categories", "id", "name", "file_name", "height", "width")
) | {"image_id", "category_id", "bbox", "area", "iscrowd"}
"""Members of JSON objects that are kept; polygons and texts would only fill the memory."""


def read_bytes(path: Path, limit: int, problems: Problems) -> bytes | None:
    """The contents of a file, or `None` and a problem: absent, unreadable or too large."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                problems.error("unreadable file", path, "", "this is no file", "give a file")
                return None
            # A size can lie (a file that grows, or one of /proc); what is read cannot.
            content = b"" if status.st_size > limit else file.read(limit + 1)
    except FileNotFoundError:
        problems.error("missing file", path, "", "there is no such annotation file", "add it")
        return None
    except (OSError, ValueError) as error:
        problems.error(
            "unreadable file", path, "", f"it cannot be read ({error})", "mend its permissions"
        )
        return None
    size = max(status.st_size, len(content))
    if size > limit:
        fact = f"it has {size:,} bytes, and more than {limit:,} are not read"
        remedy = "split it, or leave out what is not needed"
        if limit == json_limit():
            remedy += "; DETECTION_MOST_JSON_BYTES in the environment sets another limit"
        problems.error("too large", path, "", fact, remedy)
        return None
    return content


def read_text(path: Path, problems: Problems, limit: int = MOST_TEXT_BYTES) -> str | None:
    """A text file in UTF-8, or `None` and a problem."""
    content = read_bytes(path, limit, problems)
    if content is None:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.error("not text", path, "", f"this is not UTF-8 ({error})", "save it as UTF-8")
        return None


def read_json(path: Path, problems: Problems) -> Any:
    """The content of a JSON file, with `READABLE_KEYS` alone, or `None` and a problem."""
    content = read_bytes(path, json_limit(), problems)
    if content is None:
        return None
    end = 0
    for closing in re.finditer(rb"[\]}]|\Z", content):
        if closing.start() - end > LONGEST_RUN:
            fact = (
                f"{closing.start() - end:,} bytes from byte {end:,} on are one list or text; no "
                "polygon is so long"
            )
            problems.error("too large", path, "", fact, "remove that record")
            return None
        end = closing.end()
    try:
        return json.loads(content, object_hook=_readable)
    except ValueError as error:
        fact, remedy = f"this is not JSON ({error})", "export or download the file again"
    except RecursionError:
        fact, remedy = "the JSON is nested too deeply", "export the file again"
    problems.error("not JSON", path, "", fact, remedy)
    return None


def json_limit() -> int:
    """Bytes of the largest JSON file that is read: `MOST_JSON_BYTES`, or what is set."""
    text = os.environ.get("DETECTION_MOST_JSON_BYTES", "")
    return int(text) if text.isdecimal() else MOST_JSON_BYTES


def read_yaml(path: Path, problems: Problems) -> Any:
    """The content of a YAML file without aliases, or `None` and a problem.

    Aliases let a file of a few lines stand for billions of values; no data set needs them.
    """
    import yaml

    text = read_text(path, problems, MOST_YAML_BYTES)
    if text is None:
        return None
    try:
        return yaml.load(text, _safe_loader())
    except yaml.YAMLError as error:
        fact = f"this is not YAML ({' '.join(str(error).split())[:300]})"
    except RecursionError:
        fact = "the YAML is nested too deeply"
    except (ValueError, OverflowError, TypeError) as error:  # 2001-99-99, .inf as a key, ...
        fact = f"this is not YAML ({error})"
    problems.error("not YAML", path, "", fact, "mend or export the file again")
    return None


def read_xml(path: Path, problems: Problems) -> Element | None:
    """The root of an XML file without a document type, or `None` and a problem.

    Entities, which a document type would define, can stand for billions of letters.
    """
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    content = read_bytes(path, MOST_TEXT_BYTES, problems)
    if content is None:
        return None
    try:
        root: Element = fromstring(content, forbid_dtd=True)
        return root
    except DefusedXmlException:
        fact = "it has a document type or entities, which are not read"
    except (ParseError, ValueError, LookupError) as error:
        fact = f"this is not XML ({error})"
    problems.error("not XML", path, "", fact, "export the file again")
    return None


def inside(name: str) -> bool:
    """Whether a relative file name stays in its folder, on any system.

    Example:
        >>> [inside(name) for name in ("a/b.jpg", "../b.jpg", "/etc/b.jpg", "C:b.jpg")]
        [True, False, False, False]
    """
    windows = PureWindowsPath(name)
    if windows.drive or windows.root or PurePosixPath(name).is_absolute():
        return False
    return ".." not in windows.parts and is_plain(name)


def is_plain(text: str) -> bool:
    """Whether a text can be printed and written: no control characters, no half letters.

    Example:
        >>> is_plain("naïve 猫"), is_plain(chr(27)), is_plain(chr(0xD83D))
        (True, False, False)
    """
    return bool(text.strip()) and not _NOT_PLAIN.search(text)


_NOT_PLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _without_waiting(path: str, flags: int) -> int:
    # A pipe without a writer would be waited for without end.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _readable(members: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in members.items() if key in READABLE_KEYS}


def _safe_loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has aliases (*name), which are not read")
            return super().compose_node(parent, index)

    return Loader
