"""What notebooks show of Programs, their differences, and reports: HTML without script or style sheet."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slim.compiler.difference import Difference
    from slim.compiler.program import Program
    from slim.compiler.report import PipelineReport

_LINES = 2000  # of IR; a notebook keeps all that it shows


def program_html(program: Program) -> str:
    """The IR, folded below a line that says what it is."""
    text = str(program).splitlines()
    return _folded(text[0].removeprefix("# "), f"<pre>{_shown(map(escape, text))}</pre>")


_COLOURS = {"+": "#2a8a4a", "-": "#c0443c", "~": "#b07d10"}  # that can be read on white and on black


def difference_html(difference: Difference) -> str:
    """The lines that differ, in colours, folded below a line that counts them; or that there are none."""
    if not difference:
        return f"<div>{escape(difference.summary())}</div>"
    _, *lines = str(difference).splitlines()
    return _folded(difference.summary(), f"<pre>{_shown(map(_coloured, lines))}</pre>")


def _coloured(line: str) -> str:
    colour = _COLOURS.get(line[:1])
    return f'<span style="color:{colour}">{escape(line)}</span>' if colour else escape(line)


def _shown(lines: Iterable[str]) -> str:
    """Lines of HTML as one, and how many were too many."""
    lines = list(lines)
    more = [f"... and {len(lines) - _LINES} more lines"] if len(lines) > _LINES else []
    return "\n".join(lines[:_LINES] + more)


def report_html(report: PipelineReport) -> str:
    """The table of the passes, and below it, folded, all that ``print`` says."""
    from slim.compiler.report import COLUMNS, table_rows

    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in table_rows(report))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if report.passes else ""
    return table + _folded("report", f"<pre>{escape(str(report))}</pre>")


def together(title: str, parts: Iterable[str]) -> str:
    """Several pieces below a title."""
    return f"<div><code>{escape(title)}</code>{''.join(parts)}</div>"


def _cells(row: Iterable[str]) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


def _folded(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{html}</details>"
