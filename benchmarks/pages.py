"""Pages of prose in which commands write their tables, each between two marks of its own."""

from __future__ import annotations

from collections.abc import Container, Sequence

BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"


def put(text: str, name: str, content: str) -> str:
    r"""A page with something else between the marks called ``name``.

    Raises:
        ValueError: if the page has not these marks, once each.

    Example:
        >>> put("before <!-- x --> old <!-- end of x --> after", "x", "new")
        'before <!-- x -->\n\nnew\n\n<!-- end of x --> after'
    """
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"The page has not the marks {begin} and {end} once each.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def table(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    r"""A table in Markdown; the first row is its head, and columns ``right`` are set to the right.

    Example:
        >>> table([("solver", "steps"), ("Naive", "7")], right=(1,))
        '| solver | steps |\n| --- | ---: |\n| Naive | 7 |'
    """
    head, *others = rows
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *others))
